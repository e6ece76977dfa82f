"""PURE: how the members of a generation reduce tensors in the memory of their GPUs, and why so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ringps.config import TransportName
from ringps.errors import SetupError

WayName = Literal["alone", "nccl", "cuda_ipc", "staged"]


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """What one member has."""

    device: str
    """Names its GPU among all GPUs."""

    nccl: tuple[int, int, int] | None
    """Version of its NCCL."""

    no_nccl: str
    """Why there is none; "" if there is."""

    shares: bool
    """Whether members on its host can open its GPU's memory."""


class Way(NamedTuple):
    """How to reduce."""

    name: WayName
    reason: str


def choose_way(
    asked: TransportName,
    equipment: Sequence[Equipment],
    hosts: Sequence[Sequence[int]],
    failed: Collection[WayName] = (),
) -> Way:
    """What all members use.

    Args:
        asked: what they were started with.
        equipment: by rank.
        hosts: the ranks on each host.
        failed: ways that were tried and did not work on some member.

    Raises:
        SetupError: what was asked for cannot be had; says why.
    """
    if len(equipment) == 1:
        return Way("alone", "a ring of one exchanges nothing")
    against = _against_nccl(equipment)
    if asked == "nccl":
        if against:
            raise SetupError(f"--transport nccl cannot be had: {against}; use auto, cuda_ipc or tcp")
        return Way("nccl", "as asked")
    against_ipc = _against_ipc(equipment, hosts)
    if asked == "cuda_ipc":
        if against_ipc:
            raise SetupError(f"--transport cuda_ipc cannot be had: {against_ipc}; use auto, nccl or tcp")
        return Way("cuda_ipc", "as asked")
    if asked != "auto":
        return Way("staged", f"as asked: through the host's memory, over {asked}")
    if "nccl" in failed:
        against = "NCCL did not connect"
    if "cuda_ipc" in failed:
        against_ipc = "peers' memory cannot be opened"
    if not against:
        return Way("nccl", "auto: every worker has a GPU of its own")
    if not against_ipc:
        return Way("cuda_ipc", f"auto: all workers are on one host, and no NCCL: {against}")
    return Way("staged", f"auto: no NCCL: {against}; no CUDA IPC: {against_ipc}")


def _against_nccl(equipment: Sequence[Equipment]) -> str:
    """Why NCCL cannot be used; "" if it can."""
    owner: dict[str, int] = {}
    for rank, one in enumerate(equipment):
        if one.nccl is None:
            return f"rank {rank} has none ({one.no_nccl})"
        if one.device in owner:
            return f"ranks {owner[one.device]} and {rank} share a GPU"
        owner[one.device] = rank
        if one.nccl[:2] != equipment[0].nccl[:2]:  # type: ignore[index]
            ours, theirs = (".".join(map(str, version or ())) for version in (equipment[0].nccl, one.nccl))
            return f"rank 0 has version {ours}, rank {rank} {theirs}"
    return ""


def _against_ipc(equipment: Sequence[Equipment], hosts: Sequence[Sequence[int]]) -> str:
    """Why memory cannot be shared; "" if it can."""
    if len(hosts) > 1:
        return f"the workers are on {len(hosts)} hosts"
    for rank, one in enumerate(equipment):
        if not one.shares:
            return f"the memory of rank {rank}'s GPU cannot be opened by others"
    return ""
