"""Making the ranks' models equal: first their layout is compared, then rank 0's values are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ringps.buckets import Entry, ReductionRing, describe

_PACK_BYTES = 8 * 1024 * 1024


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
    """Each parameter and buffer, for `agree`."""
    for name, tensor in tensors:
        yield describe(name, tensor)


@torch.no_grad()
def replicate(ring: ReductionRing, tensors: Sequence[torch.Tensor], src: int = 0) -> None:
    """Overwrite `tensors` with rank `src`'s, in place.

    Args:
        ring: all ranks call with the same dtypes and shapes.
        tensors: of any dtype and strides, on the CPU. Small ones travel together.
        src: whose values all get.
    """
    if ring.world_size == 1:
        return
    pack: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.nbytes >= _PACK_BYTES:
            ring.broadcast(_distinct(tensor.detach()), src)
            continue
        if sum(one.nbytes for one in pack) + tensor.nbytes > _PACK_BYTES:
            _replicate_pack(ring, pack, src)
            pack = []
        pack.append(_distinct(tensor.detach()))
    _replicate_pack(ring, pack, src)


def _replicate_pack(ring: ReductionRing, pack: Sequence[torch.Tensor], src: int) -> None:
    if not pack:
        return
    flat = torch.cat([one.contiguous().view(-1).view(torch.uint8) for one in pack])
    ring.broadcast(flat, src)
    parts = torch.split(flat, [one.nbytes for one in pack])
    for one, part in zip(pack, parts, strict=True):
        # A part may start anywhere, and a view of another dtype needs its alignment.
        one.copy_(part.clone().view(one.dtype).view(one.shape))


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """A view without the repetitions of an expanded tensor, which cannot be written to."""
    for dimension, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
