"""How fast a device's memory is, and the way to it: the ceilings of everything else."""

from __future__ import annotations

import statistics
from functools import partial

import torch

import gpu_report
from gpu_device import Call, Card, fill
from gpu_report import GpuRow
from report import MIB

_COPY_BYTES = 512 * MIB
_COPY_BUFFERS = 3
"""Far more than its cache holds."""
_HOST_BYTES = 256 * MIB
_REPEATS = 30


def copy_times_s(card: Card) -> tuple[int, list[float]]:
    """Bytes that a large copy on the device moves, read and written; and its times."""
    size_bytes = card.size(_COPY_BYTES)
    pairs = [
        [card.copy(fill(size_bytes // 4, torch.float32, seed)) for _ in range(2)]
        for seed in range(_COPY_BUFFERS)
    ]
    calls = [partial(target.copy_, source) for source, target in pairs]
    return 2 * size_bytes, card.timed(calls, card.repeats(_REPEATS)).device_s


def copy_bytes_per_s(card: Card) -> float:
    """Bandwidth of such a copy: the median."""
    moved_bytes, times_s = copy_times_s(card)
    return moved_bytes / statistics.median(times_s)


def measure(card: Card) -> list[GpuRow]:
    """Copies on the device; from and to pinned memory of the host, alone and both at once."""
    moved_bytes, times_s = copy_times_s(card)
    rows = [_row(card, "copy on the device", moved_bytes, times_s)]
    size_bytes = card.size(_HOST_BYTES)
    there = [card.copy(torch.ones(size_bytes, dtype=torch.uint8)) for _ in range(2)]
    here = [card.pinned(size_bytes) for _ in range(2)]
    up = partial(there[0].copy_, here[0], non_blocking=True)
    down = partial(here[1].copy_, there[1], non_blocking=True)
    ways: dict[str, tuple[Call, int]] = {
        "copy host to device": (up, 1),
        "copy device to host": (down, 1),
        "both copies at once": (card.beside(up, down), 2),
    }
    for op, (call, count) in ways.items():
        times = card.timed([call], card.repeats(_REPEATS // 3))
        rows.append(_row(card, op, count * size_bytes, times.device_s))
    return rows


def _row(card: Card, op: str, size_bytes: int, times_s: list[float]) -> GpuRow:
    return gpu_report.measured(
        op,
        backend="torch",
        size_bytes=size_bytes,
        dtype="bytes",
        times_s=times_s,
        rehearsal=card.rehearsal,
    )
