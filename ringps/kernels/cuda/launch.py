"""Who does a tensor's arithmetic, Triton or torch, and how a kernel is launched."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from ringps.errors import SetupError

_everywhere = False


def by_kernel(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel is to handle a tensor, rather than the reference in torch."""
    return tensor.is_cuda or _everywhere


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Within it, kernels handle tensors on the CPU too.

    For tests in which Triton interprets its kernels, as it does where TRITON_INTERPRET=1 is set before it is
    first imported.
    """
    global _everywhere
    _everywhere = True
    try:
        yield
    finally:
        _everywhere = False


def kernels_of(name: str) -> ModuleType:
    """The module `name` of `ringps.kernels.cuda.jit`.

    Raises:
        SetupError: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "tensors on a GPU need Triton, which cannot be imported "
            f"({error}); pip install triton, in the version that your PyTorch asks for"
        ) from error
    return importlib.import_module(f"ringps.kernels.cuda.jit.{name}")


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int = 4, **constants: Any
) -> None:
    """Put a kernel into the current stream of `device`, which need not be the thread's current device.

    Args:
        kernel: of `kernels_of`.
        programs: how many instances; none: nothing is launched.
        device: where its tensors are.
        arguments: what varies from launch to launch.
        warps: of 32 threads, per instance.
        constants: what it is compiled for.
    """
    if programs:
        with _on(device):
            # Without contraction to fused multiply-adds the bits are those of torch's separate operators.
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def stream_key(device: torch.device) -> int:
    """Equal for equal current streams of `device`."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def upload(numbers: Sequence[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64 numbers on `device`, good for work in its current stream; does not wait for the copy."""
    if device.type != "cuda":
        return torch.as_tensor(numbers, dtype=torch.int64)
    with _on(device):
        # torch's cache of pinned memory hands a block out again only when the copies from it are done.
        pinned = torch.as_tensor(numbers, dtype=torch.int64).pin_memory()
        return pinned.to(device, non_blocking=True)


def check_flat(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """
    Raises:
        ValueError: a tensor is not contiguous, or on another device than `like`.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tuple(tensor.stride())}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, and its work is on {like.device}")


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether all begin where 16 bytes can be read at once."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
