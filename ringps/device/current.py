"""The process's accelerators: found from the first tensor that lies on one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringps.device.base import Accelerator

_known: list[Accelerator] = []


def use(accelerator: Accelerator) -> Callable[[], None]:
    """Let `accelerator_of` know of one that is no GPU, for tests; returns what undoes it."""
    _known.append(accelerator)
    return lambda: _known.remove(accelerator)


def accelerator_of(tensor: torch.Tensor) -> Accelerator | None:
    """The accelerator that a tensor lies on, None for one in the CPU's memory.

    Raises:
        ValueError: a device that ringps cannot exchange data with, or a second GPU of this process.
    """
    for one in _known:
        if one.owns(tensor):
            return one
    if tensor.is_cpu:
        return None
    if not tensor.is_cuda:
        raise ValueError(
            f"ringps handles tensors on the CPU and on CUDA GPUs; this one is on {tensor.device}"
        )
    if _known:
        raise ValueError(
            f"this tensor is on {tensor.device}, and this worker uses another GPU already: start one worker "
            "per GPU, and let each call torch.cuda.set_device() once, before anything else"
        )
    from ringps.device.cuda import CudaAccelerator  # loads CUDA's libraries

    _known.append(CudaAccelerator(tensor.device))
    return _known[0]
