"""Tensors that lie in a device's memory, brought into the CPU's: for those who save or serve them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ringps.checkpoint.packed import flat
from ringps.checkpoint.pieces import ALIGNMENT, allocate
from ringps.device import Accelerator, Mark, accelerator_of


def accelerator_among(tensors: Iterable[torch.Tensor]) -> Accelerator | None:
    """The accelerator that some of these lie on; None if all are in the CPU's memory.

    Raises:
        ValueError: one lies on a device that ringps does not know, or on another GPU than this process uses.
    """
    found = None
    for tensor in tensors:
        found = accelerator_of(tensor) or found
    return found


def start_copying(accelerator: Accelerator, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Mark:
    """Have a device copy tensors into the CPU's memory, after all that this thread has given it to do.

    Args:
        accelerator: the tensors lie on it.
        copies: for each tensor, which is contiguous, the room for it before it: uint8, of one dimension, as
            many bytes. The device writes there by itself where it is pinned.

    Returns:
        When this is reached the copies are there. Until then the rooms must stay, and the tensors may be
        changed by nothing but what this thread gives the device to do from here on.
    """

    def copy() -> None:
        for room, tensor in copies:
            room.copy_(flat(tensor), non_blocking=True)

    here = accelerator.here()
    here.run(copy)
    return here.mark()


def host_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, where the CPU can read them.

    What this thread has given the device to do is done first, and when this returns the copies are there.

    Args:
        tensors: contiguous, of any dtypes.

    Returns:
        Those of them in the CPU's memory themselves, and copies of the others: of one piece of memory that
        goes back to the system with the last of them.

    Raises:
        ValueError: as `accelerator_among`.
    """
    accelerator = accelerator_among(tensors)
    if accelerator is None:
        return list(tensors)
    begins, end = [], 0
    away = [tensor for tensor in tensors if accelerator_of(tensor) is not None]
    for tensor in away:
        begins.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    memory = allocate(end)
    rooms = [memory[begin : begin + one.nbytes] for begin, one in zip(begins, away, strict=True)]
    unpin = accelerator.pin(memory)
    try:
        start_copying(accelerator, list(zip(rooms, away, strict=True))).wait()
    finally:
        unpin()
    copies = (room.view(one.dtype).view(one.shape) for room, one in zip(rooms, away, strict=True))
    return [tensor if accelerator_of(tensor) is None else next(copies) for tensor in tensors]
