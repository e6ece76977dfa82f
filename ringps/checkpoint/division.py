"""PURE: which files a checkpoint consists of, and which rank writes each.

All ranks hold the same weights and the same state, so each writes a part, and all together write every byte
once. The weights lie in one file as long as that is no longer than what a rank has to write anyway: one file
is what people like best. The rest of the state fills up what each rank's share leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

MIB = 1024 * 1024

UNDIVIDED_BYTES = 64 * MIB
"""Weights of no more than this stay in one file, whatever the ranks' shares are."""

CUT_BYTES = MIB
"""The packed state is cut at multiples of this."""

INDEX = "model.safetensors.index.json"


class Part(NamedTuple):
    """A file, and who writes it."""

    name: str
    kind: Literal["weights", "index", "state"]
    rank: int
    weights: tuple[int, ...] = ()
    """Of kind "weights": which weights are in it, by their number."""
    start: int = 0
    """Of kind "state": which bytes of the packed state are in it, from `start` to `stop`."""
    stop: int = 0


def divide(weights: Sequence[int], state_bytes: int, world_size: int) -> tuple[Part, ...]:
    """Divide a checkpoint among the ranks.

    No rank writes more bytes of weights and state than its fair share (or `UNDIVIDED_BYTES`, if that is
    more), the longest weight and `CUT_BYTES`. Every weight lies in one file, beside its neighbours.

    Args:
        weights: bytes of each weight. There may be none; then there is no file of weights.
        state_bytes: bytes of the packed state, at least 1.
        world_size: number of ranks.

    Returns:
        The files, those of weights first, each kind in the order of its contents.
    """
    assert state_bytes > 0 and world_size > 0 and all(size >= 0 for size in weights)
    fair = -(-(sum(weights) + state_bytes) // world_size)
    shards = _shards(weights, fair)
    parts, written = [], [0] * world_size
    for rank, (first, last) in enumerate(shards):
        parts.append(
            Part(
                numbered("model", rank, len(shards), "safetensors"),
                "weights",
                rank,
                tuple(range(first, last)),
            )
        )
        written[rank] = sum(weights[first:last])
    if len(shards) > 1:
        parts.append(Part(INDEX, "index", 0))
    slices = _slices(state_bytes, [max(0, fair - size) for size in written])
    for number, (rank, start, stop) in enumerate(slices):
        name = numbered("state", number, len(slices), "bin")
        parts.append(Part(name, "state", rank, start=start, stop=stop))
    return tuple(parts)


def _shards(weights: Sequence[int], fair: int) -> list[tuple[int, int]]:
    """Contiguous weights, each shard of about as many bytes: its first weight, and the one after its last."""
    if not weights:
        return []
    total = sum(weights)
    count = 1 if total <= max(fair, UNDIVIDED_BYTES) else -(-total // fair)
    found = []
    first = before = 0
    for shard in range(1, count + 1):
        # A shard ends where the bytes so far are nearest to its part of the whole: so each is off by half a
        # weight at either end.
        last = first
        while last < len(weights) and (
            shard == count or (2 * before + weights[last]) * count <= 2 * total * shard
        ):
            before += weights[last]
            last += 1
        if last > first:  # a weight longer than several shards takes the place of them all
            found.append((first, last))
            first = last
    return found


def _slices(total: int, rooms: Sequence[int]) -> list[tuple[int, int, int]]:
    """The rank, the beginning and the end of each slice: as many bytes as the rank has room for."""
    found = []
    start = room = 0
    for rank, more in enumerate(rooms):
        room += more
        stop = total if room >= total else room // CUT_BYTES * CUT_BYTES
        if stop > start:
            found.append((rank, start, stop))
            start = stop
    assert start == total
    return found


def numbered(stem: str, index: int, count: int, suffix: str) -> str:
    """Hugging Face's way to number the files that make up one: from 1, unless there is only one."""
    return f"{stem}.{suffix}" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.{suffix}"
