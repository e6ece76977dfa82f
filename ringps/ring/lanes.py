"""Which members of a generation share a host, and who exchanges with whom between hosts."""

from __future__ import annotations

from ringps.ring.topology import Generation


def hosts(generation: Generation) -> tuple[tuple[int, ...], ...]:
    """The ranks of each host, in ring order; hosts in the order of their first member."""
    by_name: dict[str, list[int]] = {}
    for rank, member in enumerate(generation.members):
        by_name.setdefault(member.host, []).append(rank)
    return tuple(tuple(ranks) for ranks in by_name.values())


def lanes(by_host: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """One ring between hosts per local rank that every host has; lane i joins the i-th members.

    A slice of a tensor travels on each lane. Members beyond the smallest host's have none.
    """
    return tuple(zip(*by_host, strict=False))
