"""What the GPU's kernels and their references in torch must agree on, to the bit.

A case makes its inputs from a seed, has them handled on a device, and gives back on the CPU what came out.
In `tests/single/test_cuda_kernels.py` Triton interprets the kernels, in `tests/gpu/test_kernels.py` a GPU
runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ringps.kernels.cpu import ReduceOp
from ringps.kernels.cuda import digest as hashing
from ringps.kernels.cuda import quantize as quantizing
from ringps.kernels.cuda.fold import fold
from ringps.kernels.cuda.pack import PackPlan

Case = Callable[[str], list[torch.Tensor]]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float64, torch.float32, *HALVES)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
OPS: tuple[ReduceOp, ...] = ("sum", "mean", "min", "max", "prod")


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Equal bits, but any NaN equals any other."""
    return len(found) == len(expected) and all(
        one.dtype is other.dtype and one.shape == other.shape and _same(one, other)
        for one, other in zip(found, expected, strict=True)
    )


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    alike = (_octets(found) == _octets(expected)).all(1)
    return bool((alike | (found != found) & (expected != expected)).all())


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).view(tensor.numel(), tensor.itemsize)


def values(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of all magnitudes that a dtype has, subnormals and signed zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    if not dtype.is_floating_point:
        return torch.randint(-(2**62), 2**62, (numel,), generator=generator).to(dtype)
    scale = torch.randint(-30 if dtype is torch.float16 else -140, 12, (numel,), generator=generator)
    mixed = torch.randn(numel, dtype=torch.float64, generator=generator) * torch.exp2(scale.double())
    mixed[::7] = torch.randn(mixed[::7].shape, dtype=torch.float64, generator=generator)
    mixed[3::50] = 0.0
    mixed[4::50] = -0.0
    return mixed.to(dtype)


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """With a NaN and infinities in it."""
    if tensor.is_floating_point() and tensor.numel() > 40:
        tensor[11], tensor[23], tensor[37] = float("nan"), float("inf"), -float("inf")
    return tensor


def shifted(tensor: torch.Tensor, device: str, elements: int) -> torch.Tensor:
    """On the device, so many elements behind an address that is a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=device)
    room[elements:] = tensor
    return room[elements:]


def packed(
    device: str,
    *,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    flat_dtype: torch.dtype,
    weights: tuple[float | None, ...] = (None, 0.5, 1 / 3, 0.0),
    slot_elements: int = 32,
    shift: int = 0,
) -> list[torch.Tensor]:
    """Pack by each weight, then unpack; one plan, whose tables are used again."""
    starts, end = [], 3 if slot_elements == 1 else 0
    for size in sizes:
        starts.append(end)
        end = -(-(end + size + 1) // slot_elements) * slot_elements
    plan = PackPlan(sizes, starts, flat_dtype, device)
    sources = [
        None if dtype is None else shifted(spoil(values(size, dtype, position)), device, shift)
        for position, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    results = []
    for weight in weights:
        flat = torch.full((end + 5,), 7.0, dtype=flat_dtype, device=device)
        plan.pack(sources, flat, weight)
        results.append(flat)
    moved = [None if source is None else source.clone() for source in sources]
    plan.pack(moved, flat, 2.0)
    results.append(flat)
    targets = [
        None if source is None else shifted(torch.zeros_like(source, device="cpu"), device, shift)
        for source in sources
    ]
    plan.unpack(flat, targets)
    return [tensor.cpu() for tensor in [*results, *targets] if tensor is not None]


def folded(
    device: str, *, dtype: torch.dtype, op: ReduceOp, count: int, numel: int, shift: int = 0
) -> list[torch.Tensor]:
    """Into a new tensor, and into the last input."""
    # Which of two zeros min and max take is not fixed.
    given = [values(numel, dtype, 10 + rank) for rank in range(count)]
    if op in ("min", "max"):
        given = [torch.where(tensor == 0, torch.ones_like(tensor), tensor) for tensor in given]
    inputs = [shifted(spoil(tensor), device, shift) for tensor in given]
    out = torch.empty(numel, dtype=dtype, device=device)
    fold(inputs, out, op, count)
    fold(inputs, inputs[-1], op, count)
    return [out.cpu(), inputs[-1].cpu()]


def folded_in_parts(device: str, *, dtype: torch.dtype) -> list[torch.Tensor]:
    """A partial result in float32, and what comes of it and more inputs."""
    inputs = [values(1500, dtype, rank).to(device) for rank in range(5)]
    part = torch.empty(1500, dtype=torch.float32, device=device)
    fold(inputs[:2], part, "mean")
    out = torch.empty(1500, dtype=dtype, device=device)
    fold([part, *inputs[2:]], out, "mean", 5)
    whole = torch.empty(1500, dtype=dtype, device=device)
    fold(inputs, whole, "mean", 5)
    return [part.cpu(), out.cpu(), whole.cpu()]


def hashed(device: str, *, sizes: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> list[torch.Tensor]:
    results = []
    for size in sizes:
        out = torch.full((2,), 5, dtype=torch.int64, device=device)
        hashing.digest_into(shifted(values(size, dtype, size), device, shift), out)
        results.append(out.cpu())
    return results


def quantized(
    device: str, *, numel: int, dtype: torch.dtype, block: int = 256, spoilt: bool = False
) -> list[torch.Tensor]:
    given = values(numel, dtype, 1)
    given[block : 2 * block] = 0
    x = (spoil(given) if spoilt else given).to(device)
    encoded = torch.full((numel,), 5, dtype=torch.int8, device=device)
    scales = torch.full((-(-numel // block),), 5.0, device=device)
    quantizing.quantize(x, encoded, scales, block)
    decoded = torch.full_like(x, 5.0)
    quantizing.dequantize(encoded, scales, decoded, block)
    added = values(numel, dtype, 2).to(device)
    quantizing.dequantize_add(encoded, scales, added, block)
    return [encoded.cpu(), scales.cpu(), decoded.cpu(), added.cpu()]


_ODD = (5000, 1, 0, 17, 33, 4096, 9)
_HUGE = (3_000_001, 64, 1_000_000, 5, 70_000)

CASES: dict[str, Case] = {
    **{
        f"pack {str(source)[6:]} into {str(target)[6:]}": partial(
            packed,
            sizes=_ODD,
            dtypes=(source, source, source, None, source, source, source),
            flat_dtype=target,
        )
        for source in FLOATS
        for target in FLOATS
    },
    "pack several dtypes": partial(
        packed,
        sizes=_ODD,
        dtypes=(None, torch.float64, None, torch.float16, torch.bfloat16, torch.float32, torch.float16),
        flat_dtype=torch.float32,
    ),
    "pack unaligned sources": partial(
        packed, sizes=_ODD, dtypes=(torch.float32,) * 7, flat_dtype=torch.float32, shift=1
    ),
    "pack unaligned slots": partial(
        packed, sizes=_ODD, dtypes=(torch.bfloat16,) * 7, flat_dtype=torch.bfloat16, slot_elements=1
    ),
    "pack nothing but None": partial(
        packed, sizes=_ODD, dtypes=(None,) * 7, flat_dtype=torch.float16, weights=(None, 0.5)
    ),
    "pack no tensors": partial(packed, sizes=(), dtypes=(), flat_dtype=torch.float32),
    "pack empty tensors": partial(
        packed, sizes=(0, 0), dtypes=(torch.float32,) * 2, flat_dtype=torch.float32
    ),
    **{
        f"fold {op} of {str(dtype)[6:]}": partial(folded, dtype=dtype, op=op, count=3, numel=4999)
        for op in OPS
        for dtype in (*FLOATS, *INTEGERS)
        if op != "mean" or dtype.is_floating_point
    },
    **{
        f"fold {op} of bool": partial(folded, dtype=torch.bool, op=op, count=3, numel=4999)
        for op in ("min", "max")
    },
    **{
        f"fold {count} inputs of {str(dtype)[6:]}": partial(
            folded, dtype=dtype, op="mean", count=count, numel=1025
        )
        for dtype in (torch.float32, torch.bfloat16)
        for count in (1, 2, 4, 5, 6, 7, 8, 9, 15, 16, 17)
    },
    "fold unaligned": partial(folded, dtype=torch.float16, op="sum", count=2, numel=4999, shift=3),
    "fold nothing": partial(folded, dtype=torch.float32, op="mean", count=2, numel=0),
    "fold in parts, float16": partial(folded_in_parts, dtype=torch.float16),
    "fold in parts, float32": partial(folded_in_parts, dtype=torch.float32),
    "digest small": partial(hashed, sizes=tuple(range(26)), dtype=torch.uint8),
    "digest large": partial(hashed, sizes=(8191, 8192, 8193, 25_003), dtype=torch.uint8),
    "digest unaligned": partial(hashed, sizes=(0, 1, 7, 8, 9, 8191, 8200), dtype=torch.uint8, shift=3),
    "digest floats": partial(hashed, sizes=(0, 1, 5, 3001), dtype=torch.float32, shift=1),
    "digest bool": partial(hashed, sizes=(3001,), dtype=torch.bool),
    **{
        f"quantize {numel} of {str(dtype)[6:]}": partial(quantized, numel=numel, dtype=dtype)
        for dtype in (torch.float32, *HALVES)
        for numel in (1, 256, 8192, 9001)
    },
    "quantize spoilt": partial(quantized, numel=5000, dtype=torch.float32, spoilt=True),
    "quantize small blocks": partial(quantized, numel=5000, dtype=torch.float32, block=16),
    "quantize large blocks": partial(quantized, numel=9000, dtype=torch.bfloat16, block=4096),
}
"""Small enough for an interpreter."""

LARGE_CASES: dict[str, Case] = {
    **{
        f"pack {str(dtype)[6:]}": partial(
            packed, sizes=_HUGE, dtypes=(dtype,) * 5, flat_dtype=dtype, weights=(None, 1 / 3)
        )
        for dtype in FLOATS
    },
    "pack 300 tensors": partial(
        packed,
        sizes=tuple(1000 + 37 * position for position in range(300)),
        dtypes=tuple((None, *FLOATS)[position % 5] for position in range(300)),
        flat_dtype=torch.bfloat16,
    ),
    **{
        f"fold {op} of {count} {str(dtype)[6:]}": partial(
            folded, dtype=dtype, op=op, count=count, numel=3_000_001
        )
        for op in ("sum", "mean", "max")
        for dtype in (torch.float32, torch.bfloat16)
        for count in (2, 8, 11)
    },
    "digest": partial(hashed, sizes=(50_000_003, 16_777_216), dtype=torch.uint8),
    "digest unaligned": partial(hashed, sizes=(20_000_003,), dtype=torch.uint8, shift=5),
    "quantize": partial(quantized, numel=5_000_001, dtype=torch.float32),
    "quantize bfloat16": partial(quantized, numel=5_000_001, dtype=torch.bfloat16),
}
"""For a GPU."""
