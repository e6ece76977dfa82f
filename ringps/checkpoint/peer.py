"""Getting the training state from peers: from all at once, only what differs, and every piece checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ringps.checkpoint import peer_wire as wire
from ringps.checkpoint.comparison import Comparison
from ringps.checkpoint.crew import Crew
from ringps.checkpoint.peer_wire import Kind, Request, Summary
from ringps.checkpoint.pieces import MAX_LAYOUT_BYTES, Layout, digest
from ringps.checkpoint.shares import MOST_TRIES
from ringps.checkpoint.source import Source, SourceLost, split
from ringps.checkpoint.transfer import Transfer
from ringps.checkpoint.tree import MAX_SKELETON_BYTES, State
from ringps.config import Timeouts
from ringps.errors import DivergedError, FrameError
from ringps.transport.keys import JobKey


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A state from peers, for `tree.unflatten`, and how it came."""

    skeleton: bytes

    tensors: list[torch.Tensor]
    """Each in memory of its own, which begins at a multiple of 64 bytes."""

    bytes_fetched: int
    """Of the tensors, what came from servers."""

    bytes_skipped: int
    """Of the tensors, what was the same in the caller's own state."""

    pieces_refetched: int
    """How often a piece came with a wrong hash, and was asked for again."""

    lost: Mapping[str, str]
    """Servers that did not hold out to the end, and why."""

    seconds: float
    """All in all."""

    agreeing_s: float
    """Of that, until it was known what to fetch: meeting the servers, hashing, comparing."""


def fetch(
    servers: Sequence[str],
    token: JobKey,
    step: int,
    own: State | None = None,
    *,
    timeouts: Timeouts | None = None,
    check: Callable[[], None] = lambda: None,
) -> Fetched:
    """Get the state of `step` from several `StateServer`s that hold the same.

    The servers are asked for the hashes of the state's pieces, each piece's two of them where there are two.
    Pieces that `own` does not have are then fetched from all servers at once. The work of a server that fails
    is done by the others.

    Args:
        servers: `HOST:PORT` of each.
        token: its secret half is what both sides must know.
        step: the step whose state is wanted.
        own: this process's state, as `tree.flatten` gives it. If its tensors have the same dtypes and shapes,
            pieces of it that are right already are copied rather than fetched. It is only read.
        timeouts: `connect_timeout_s` limits meeting a server, `silent_link_s` how long a server may send
            nothing, `feed_timeout_s` all of it.
        check: called now and then by the calling thread; what it raises ends the fetch and is passed on.

    Returns:
        The state, in new memory.

    Raises:
        DivergedError: servers hold different states; the message says which.
        SetupError: no server is left, a piece keeps coming wrong, or `feed_timeout_s` is over.
        ValueError: there are no servers, an address is not `HOST:PORT`, or the tensors of `own` are not as
            `tree.flatten` gives them.
    """
    if not servers:
        raise ValueError("servers is empty: name at least one process that serves the state")
    began_s = time.monotonic()
    timeouts = timeouts or Timeouts()
    places = [split(address) for address in servers]
    sources = [Source(*named, timeouts) for named in zip(servers, places, strict=True)]
    crew = Crew(sources, began_s + timeouts.feed_timeout_s, check)
    try:
        crew.each(lambda source: source.meet(token.secret))
        skeleton, layout = _agree(crew, step)
        comparison = Comparison(crew, layout, own)
        hashes = comparison.agreed()
        known = comparison.known(hashes)
        agreed_s = time.monotonic()
        transfer = Transfer(crew, layout, hashes, known, step=step)
        transfer.run(comparison.mine)
    finally:
        crew.close()
    skipped = sum(map(layout.size_of, known))
    return Fetched(
        skeleton=skeleton,
        tensors=transfer.target.tensors,
        bytes_fetched=sum(map(layout.size_of, range(layout.piece_count))) - skipped,
        bytes_skipped=skipped,
        pieces_refetched=transfer.refetched,
        lost=MappingProxyType(crew.lost),
        seconds=time.monotonic() - began_s,
        agreeing_s=agreed_s - began_s,
    )


def _agree(crew: Crew, step: int) -> tuple[bytes, Layout]:
    """The skeleton and layout that all servers hold.

    Raises:
        DivergedError: they do not hold the same.
    """

    def summarize(source: Source) -> Summary:
        source.ask(Request(Kind.SUMMARY))
        summary = wire.decode_summary(bytes(source.receive_bytes(wire.SUMMARY_BYTES)))
        if summary.step != step:
            raise SourceLost(f"it serves the state of step {summary.step}, not of step {step}")
        if summary.skeleton_bytes > MAX_SKELETON_BYTES or summary.layout_bytes > MAX_LAYOUT_BYTES:
            raise FrameError("state description too long")
        return summary

    summaries = crew.each(summarize)
    holders: dict[Summary, list[str]] = {}
    for source in crew.sources:
        holders.setdefault(summaries[source], []).append(source.address)
    if len(holders) > 1:
        said = "; another: ".join(" and ".join(addresses) for addresses in holders.values())
        raise DivergedError(
            f"the servers' states of step {step} differ in their structure or plain values. One: {said}",
            worker_ids=(),
        )
    (summary,) = holders

    def describe(source: Source) -> tuple[bytes, Layout]:
        for _ in range(MOST_TRIES):
            source.ask(Request(Kind.SKELETON))
            skeleton = source.receive_bytes(summary.skeleton_bytes)
            layout = source.receive_bytes(summary.layout_bytes)
            if digest([memoryview(skeleton), memoryview(layout)]) == summary.digest:
                return bytes(skeleton), Layout.decode(bytes(layout))
        raise SourceLost("its state's description does not come with the hash that it should have")

    while True:
        # A source that fails is one no more; without any, this raises.
        for described in crew.each(describe, only=1).values():
            return described
