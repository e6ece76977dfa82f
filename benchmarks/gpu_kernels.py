"""How fast are memory and kernels on one GPU? Each kernel against the bandwidth of a large copy.

A kernel is counted by the bytes that it must move: every input read once, every output written once. Times
are the device's own, by events, with the host ahead of it; what the host takes to launch is in `env`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

import gpu_device
import gpu_memory
import gpu_report
from gpu_device import Call, Card, fill
from gpu_report import GpuRow
from report import MIB
from ringps.buckets.layout import ALIGNMENT_BYTES
from ringps.kernels.cuda.digest import digest_into
from ringps.kernels.cuda.fold import fold
from ringps.kernels.cuda.pack import PackPlan
from ringps.kernels.cuda.quantize import BLOCK, dequantize_add, quantize

_PACK_BAR, _BAR = 0.85, 0.80
_SETS = 3
"""Inputs and outputs that take turns: together far more than a cache holds."""
_REPEATS = 30
_LAYERS, _WIDTH = 25, 288
_FOLD_BYTES, _DIGEST_BYTES, _QUANTIZE_NUMEL = 64 * MIB, 256 * MIB, 64 * MIB


@dataclass(frozen=True)
class Measured:
    """What all kernels are compared with, and on."""

    card: Card
    copy_bytes_per_s: float

    def row(
        self,
        op: str,
        calls: Sequence[Call],
        moved_bytes: int,
        dtype: torch.dtype,
        *,
        backend: str = "ringps",
        bar: float | None = None,
    ) -> GpuRow:
        """Measure calls that do the same, each on memory of its own."""
        times = self.card.timed(calls, self.card.repeats(_REPEATS))
        host_us = round(1e6 * statistics.median(times.host_s), 1)
        return gpu_report.measured(
            op,
            backend=backend,
            size_bytes=moved_bytes,
            dtype=str(dtype).removeprefix("torch."),
            times_s=times.device_s,
            rehearsal=self.card.rehearsal,
            ceiling_s=moved_bytes / self.copy_bytes_per_s,
            bar=bar,
            facts={"host_us": host_us, "counted": "bytes read and bytes written"},
        )


def shapes(card: Card) -> list[int]:
    """Elements of the tensors of a transformer's layers, large and small: 100 MB of float32 in 200."""
    width = 8 if card.rehearsal else _WIDTH
    matrix = width * width
    layer = [3 * matrix, 3 * width, matrix, width, 4 * matrix, 4 * width, 4 * matrix, width]
    return layer * _LAYERS


def measure_pack(on: Measured) -> list[GpuRow]:
    """Many tensors into a flat one and back; beside it, what torch has for it."""
    sizes = shapes(on.card)
    grain = ALIGNMENT_BYTES // 4
    room = [-(-size // grain) * grain for size in sizes]
    starts = [0, *accumulate(room)][:-1]
    pack, unpack, torch_pack, torch_cat = [], [], [], []
    for seed in range(_SETS):
        sources = [on.card.copy(fill(size, torch.float32, seed)) for size in sizes]
        flat = on.card.copy(torch.zeros(sum(room)))
        plan = PackPlan(sizes, starts, torch.float32, flat.device)
        views = [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        together = on.card.copy(torch.zeros(sum(sizes)))
        pack.append(partial(plan.pack, sources, flat))
        unpack.append(partial(plan.unpack, flat, sources))
        torch_pack.append(partial(torch._foreach_copy_, views, sources))
        torch_cat.append(partial(torch.cat, sources, out=together))
    moved_bytes = 2 * 4 * sum(sizes)
    found = on.row("pack", pack, moved_bytes, torch.float32, bar=_PACK_BAR)
    return [
        found,
        on.row("unpack", unpack, moved_bytes, torch.float32, bar=_PACK_BAR),
        on.row("pack", torch_pack, moved_bytes, torch.float32, backend="torch _foreach_copy_"),
        on.row("pack", torch_cat, moved_bytes, torch.float32, backend="torch cat"),
    ]


def measure_fold(on: Measured) -> list[GpuRow]:
    """So many inputs into one output; beside it torch's additions, one after the other."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        numel = on.card.size(_FOLD_BYTES) // dtype.itemsize
        for count in (2, 4, 8):
            calls, additions = [], []
            for seed in range(_SETS):
                inputs = [on.card.copy(fill(numel, dtype, seed + place)) for place in range(count)]
                out = on.card.copy(torch.zeros(numel, dtype=dtype))
                calls.append(partial(fold, inputs, out, "sum"))
                additions.append(partial(_add_up, inputs, out))
            moved_bytes = (count + 1) * numel * dtype.itemsize
            rows.append(on.row(f"fold {count}", calls, moved_bytes, dtype, bar=_BAR))
            if dtype is torch.float32:
                rows.append(on.row(f"fold {count}", additions, moved_bytes, dtype, backend="torch add"))
    return rows


def measure_digest(on: Measured) -> list[GpuRow]:
    """A hash of one tensor."""
    size_bytes = on.card.size(_DIGEST_BYTES)
    calls = []
    for seed in range(_SETS):
        tensor = on.card.copy(fill(size_bytes // 4, torch.float32, seed))
        out = on.card.copy(torch.zeros(2, dtype=torch.int64))
        calls.append(partial(digest_into, tensor, out))
    return [on.row("digest", calls, size_bytes, torch.float32, bar=_BAR)]


def measure_quantize(on: Measured) -> list[GpuRow]:
    """int8 with a scale per block, there and back."""
    rows = []
    numel = on.card.size(_QUANTIZE_NUMEL)
    for dtype in (torch.float32, torch.bfloat16):
        there, back = [], []
        for seed in range(_SETS):
            x = on.card.copy(fill(numel, dtype, seed))
            values = on.card.copy(torch.zeros(numel, dtype=torch.int8))
            scales = on.card.copy(torch.zeros(-(-numel // BLOCK)))
            there.append(partial(quantize, x, values, scales))
            back.append(partial(dequantize_add, values, scales, x))
        encoded_bytes = numel + 4 * -(-numel // BLOCK)
        plain_bytes = numel * dtype.itemsize
        rows.append(on.row("quantize", there, plain_bytes + encoded_bytes, dtype, bar=_BAR))
        rows.append(on.row("dequantize and add", back, 2 * plain_bytes + encoded_bytes, dtype, bar=_BAR))
    return rows


def _add_up(inputs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    torch.add(inputs[0], inputs[1], out=out)
    for one in inputs[2:]:
        out.add_(one)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and kernels on one GPU.")
    gpu_device.add_options(parser)
    options = parser.parse_args()
    card = gpu_device.card(options.rehearse)
    rows = gpu_memory.measure(card)
    on = Measured(card, gpu_memory.copy_bytes_per_s(card))
    for measure in (measure_pack, measure_fold, measure_digest, measure_quantize):
        rows += measure(on)
        gpu_report.write(options.json, rows)  # what fails later takes nothing from these
    for one in rows:
        print(f"{one.op} {one.backend}: {one.time_us:.1f} us, {one.algbw_gbps:.0f} GB/s")


if __name__ == "__main__":
    main()
