"""Making sure that all ranks mean the same thing before they exchange it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

import msgpack

from ringps.buckets.ring import ReductionRing
from ringps.errors import LayoutMismatchError

Entry = tuple[str, str]
"""A name and a description of what has it, such as ("fc.weight", "float32[10, 20]")."""


def agree(ring: ReductionRing, entries: Sequence[Entry]) -> None:
    """Return if `entries` are the same on every rank.

    The ranks compare digests, and the entries themselves only if those differ.

    Raises:
        LayoutMismatchError: on every rank, if any two differ; names the first entry that does and
            what each rank has.
    """
    if ring.world_size == 1:
        return
    packed: bytes = msgpack.packb(list(entries))
    if len(set(ring.gather_bytes(sha256(packed).digest()))) == 1:
        return
    by_rank = [[(name, what) for name, what in msgpack.unpackb(raw)] for raw in ring.gather_bytes(packed)]
    raise LayoutMismatchError(first_difference(by_rank))


def first_difference(by_rank: Sequence[Sequence[Entry]]) -> str:
    """The first entry that is not the same on all ranks, in words."""
    for at in itertools.count():
        here = [entries[at] if at < len(entries) else None for entries in by_rank]
        if len(set(here)) > 1:
            break
    names = [entry[0] for entry in here if entry is not None]
    # A name that a rank lacks altogether tells more than the one that moved into its place.
    known = [{name for name, _ in entries} for entries in by_rank]
    subject = next((name for name in names if not all(name in some for some in known)), names[0])
    ranks_with: defaultdict[str, list[int]] = defaultdict(list)
    for rank, entry in enumerate(here):
        if subject not in known[rank]:
            what = "nothing of that name"
        elif entry is not None and entry[0] == subject:
            what = entry[1]
        else:
            what = "it at another place"
        ranks_with[what].append(rank)
    parts = [f"{_ranks(ranks)} {what}" for what, ranks in ranks_with.items()]
    return (
        f'the ranks differ at "{subject}": {"; ".join(parts)}. '
        "Build the same model and optimizer on every rank"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
