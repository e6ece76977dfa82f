"""Making the ranks' models equal: first their layout is compared, then rank 0's values are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ringps.buckets import Entry, ReductionRing, describe
from ringps.device import accelerator_of

_PACK_BYTES = 8 * 1024 * 1024
_ALIGNMENT_BYTES = 64
"""Where a tensor begins in a pack: a view of any dtype needs its alignment."""


def describe_optimizer(
    optimizer: torch.optim.Optimizer, name_of: Callable[[torch.Tensor], str]
) -> Iterator[Entry]:
    """The kind of optimizer, and each group's parameters and plain options, for `agree`."""
    yield "optimizer", type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups):
        members = ", ".join(name_of(parameter) for parameter in group["params"])
        yield f"param_groups[{number}]", f"[{members}]"
        for option, value in sorted(group.items()):
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, bool | int | float | str | tuple | None):
                yield f"param_groups[{number}][{option!r}]", repr(value)


def describe_model(tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[Entry]:
    """Each parameter and buffer, for `agree`. Of its device counts whether it is a GPU, not which one."""
    for name, tensor in tensors:
        yield describe(name, tensor)


@torch.no_grad()
def replicate(ring: ReductionRing, tensors: Sequence[torch.Tensor], src: int = 0) -> None:
    """Overwrite `tensors` with rank `src`'s, in place.

    Args:
        ring: all ranks call with the same dtypes and shapes.
        tensors: of any dtype and strides, on the CPU or this worker's GPU; which of the two, alike on all
            ranks. Small ones on the same travel together.
        src: whose values all get.

    Raises:
        ValueError: a tensor is on another device.
        RingpsError: what collectives raise.
    """
    if ring.world_size == 1:
        return
    packs: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for tensor in tensors:
        pack = packs[accelerator_of(tensor) is not None]
        if tensor.nbytes >= _PACK_BYTES:
            ring.broadcast(_distinct(tensor.detach()), src)
            continue
        if sum(_aligned(one.nbytes) for one in pack) + tensor.nbytes > _PACK_BYTES:
            _replicate_pack(ring, pack, src)
            pack.clear()
        pack.append(_distinct(tensor.detach()))
    for pack in packs.values():
        _replicate_pack(ring, pack, src)


def _replicate_pack(ring: ReductionRing, pack: Sequence[torch.Tensor], src: int) -> None:
    if not pack:
        return
    flat = torch.zeros(sum(_aligned(one.nbytes) for one in pack), dtype=torch.uint8, device=pack[0].device)
    parts, begin = [], 0
    for one in pack:
        parts.append(flat[begin : begin + one.nbytes].view(one.dtype).view(one.shape))
        parts[-1].copy_(one)
        begin += _aligned(one.nbytes)
    ring.broadcast(flat, src)
    for one, part in zip(pack, parts, strict=True):
        one.copy_(part)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """A view without the repetitions of an expanded tensor, which cannot be written to."""
    for dimension, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
