"""PURE: how the members of a generation exchange data, and why so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ringps.config import TransportName
from ringps.errors import SetupError


class Choice(NamedTuple):
    """A way to exchange data."""

    way: Literal["alone", "shm", "tcp", "zmq", "hierarchical"]
    reason: str


def choose(asked: Sequence[TransportName], hosts: Sequence[Sequence[int]]) -> Choice:
    """What all members use.

    Args:
        asked: what each rank was started with.
        hosts: the ranks on each host.

    Raises:
        SetupError: they were started with different wishes, or with one that cannot be had.
    """
    wish = asked[0]
    for rank, other in enumerate(asked):
        if other != wish:
            raise SetupError(
                f"rank 0 was started with --transport {wish}, rank {rank} with --transport {other}; "
                "start all launchers of a job with the same one"
            )
    if len(asked) == 1:
        return Choice("alone", "a ring of one exchanges nothing")
    if wish == "shm":
        if len(hosts) > 1:
            raise SetupError(
                f"--transport shm needs all workers on one host, and they are on {len(hosts)}; "
                "use auto or tcp"
            )
        return Choice("shm", "as asked")
    if wish in ("tcp", "zmq"):
        return Choice(wish, "as asked")
    why = f"{wish} for tensors on GPUs, and else auto" if wish != "auto" else "auto"
    if len(hosts) == 1:
        return Choice("shm", f"{why}: all workers are on one host")
    if any(len(ranks) > 1 for ranks in hosts):
        return Choice("hierarchical", f"{why}: shared memory inside the hosts, TCP between them")
    return Choice("tcp", f"{why}: every worker is on a host of its own")
