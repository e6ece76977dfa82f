"""Blocks of floats as int8 with a float32 scale each (Dettmers et al., 2022; by absmax, without a codebook).

Kernels and reference come to the same bits, so that ranks which decode the same bytes hold the same values. A
block whose largest magnitude is `m` has the scale `m / 127`, and a decoded element differs from the given one
by half a scale at most, apart from the rounding of product and cast. Exceptions: where `m` is below 1.5e-36
the scale is subnormal and less exact; and of a block with a NaN or an infinity every element decodes to NaN,
so that it shows.
"""

from __future__ import annotations

import torch

from ringps.kernels.cuda.launch import by_kernel, check_flat, kernels_of, launch

BLOCK = 256
"""Elements that share a scale, where nothing else is said."""

_TILE = 4096
"""Elements of an instance, in whole blocks."""

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@torch.no_grad()
def quantize(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, block: int = BLOCK) -> None:
    """Encode `x`.

    Args:
        x: float32, float16 or bfloat16; contiguous.
        values: int8, as many elements; written. Each is x / scale, rounded half to even, from -127 to 127.
        scales: float32, one for each block, of which the last may be shorter; written.
        block: elements that share a scale; a power of two from 16 to 4096.

    Raises:
        ValueError: tensors that do not fit together.
        SetupError: they are on a GPU, and Triton is not installed.
    """
    _check(x, values, scales, block)
    if by_kernel(x):
        rows = _TILE // block
        arguments = (x, values, scales, x.numel())
        programs = -(-scales.numel() // rows)
        launch(kernels_of("quantize").quantize, programs, x.device, *arguments, ROWS=rows, BLOCK=block)
        return
    encoded, whole = values.view(-1), x.numel() // block * block
    _encode(x.view(-1)[:whole].view(-1, block), encoded[:whole].view(-1, block), scales[: whole // block])
    if whole < x.numel():
        _encode(x.view(-1)[whole:].view(1, -1), encoded[whole:].view(1, -1), scales[-1:])


def dequantize(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int = BLOCK) -> None:
    """`out = values * scale`, in float32, then cast. Arguments and errors as `quantize`."""
    _decode(values, scales, out, block, add=False)


def dequantize_add(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int = BLOCK) -> None:
    """`out += values * scale`, in float32, then cast; the product is rounded before it is added.

    Arguments and errors as `quantize`.
    """
    _decode(values, scales, out, block, add=True)


@torch.no_grad()
def _decode(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int, *, add: bool) -> None:
    _check(out, values, scales, block)
    if by_kernel(out):
        rows = _TILE // block
        arguments = (values, scales, out, out.numel())
        programs = -(-scales.numel() // rows)
        launch(
            kernels_of("quantize").dequantize,
            programs,
            out.device,
            *arguments,
            ADD=add,
            ROWS=rows,
            BLOCK=block,
        )
        return
    flat = out.view(-1)
    decoded = values.view(-1).float()
    whole = flat.numel() // block * block
    decoded[:whole].view(-1, block).mul_(scales[: whole // block, None])
    decoded[whole:].mul_(scales[whole // block :])
    flat.copy_(flat.float() + decoded if add else decoded)


def _encode(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Rows of elements that share a scale."""
    given = x.float()
    torch.div(given.abs().amax(1), torch.full_like(scales, 127.0), out=scales)
    usable = (scales > 0) & scales.isfinite()
    quotient = given / torch.where(usable, scales, 1.0)[:, None]
    values.copy_(torch.where(usable[:, None], quotient, 0.0).round_().clamp_(-127, 127))


def _check(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    if not 16 <= block <= _TILE or block & (block - 1):
        raise ValueError(f"block must be a power of two from 16 to {_TILE}, not {block}")
    blocks = -(-x.numel() // block)
    wanted = ((x.dtype, _DTYPES), (values.dtype, {torch.int8}), (scales.dtype, {torch.float32}))
    if any(dtype not in allowed for dtype, allowed in wanted):
        raise ValueError(
            f"cannot quantise {x.dtype} to values of {values.dtype} and scales of {scales.dtype}; it takes "
            "float32, float16 or bfloat16, int8 and float32"
        )
    if (values.numel(), scales.numel()) != (x.numel(), blocks):
        raise ValueError(
            f"{x.numel()} elements in blocks of {block} need as many values and {blocks} scales; there are "
            f"{values.numel()} and {scales.numel()}"
        )
    check_flat("the tensor", x, x)
    check_flat("values", values, x)
    check_flat("scales", scales, x)
