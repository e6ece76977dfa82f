"""Hashes of tensors on a GPU, made where the tensors are.

The memory is read as 64-bit words. Each is joined with a multiple of its number, mixed (multiply and xor-
shift, as MurmurHash3's finaliser does; Appleby, 2011) and multiplied once more in two ways; each of the two
results is summed up modulo 2^64. Sums do not depend on the order of the terms, so thousands of threads come
to the same bits without waiting for each other. It notices accidents, not forgery. `ringps.kernels.digest`
hashes otherwise on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringps.kernels.cuda.launch import by_kernel, check_flat, kernels_of, launch

# Odd numbers that other hashes multiply by: those of XXH3, SplitMix64 and MurmurHash3.
SEED = 0x9FB21C651E98DF25
PLACE = 0x9E3779B97F4A7C15
WORD = 0xFF51AFD7ED558CCD
FIRST = 0xC4CEB9FE1A85EC53
SECOND = 0xBF58476D1CE4E5B9
TURN = 0x94D049BB133111EB

_BLOCK = 1024
_NARROW_BLOCK = 128
"""Where words are put together of single bytes, which takes more registers."""

_MOST_PROGRAMS = 2048
"""Each ends with two additions in one place of memory, which go one by one."""

_CPU_BLOCK = 1 << 15


@torch.no_grad()
def digest_into(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Hash a tensor's bytes; does not wait.

    The hash depends on the number of bytes and on each of them, not on dtype, shape or alignment.

    Args:
        tensor: contiguous, of any dtype.
        out: int64, of 2 elements, on the same device; overwritten.

    Raises:
        ValueError: not contiguous, on two devices, or an `out` of another kind.
        SetupError: they are on a GPU, and Triton is not installed.
    """
    check_flat("the tensor to be hashed", tensor, tensor)
    check_flat("the hash", out, tensor)
    if out.dtype is not torch.int64 or out.numel() != 2:
        raise ValueError(f"a hash is two int64; out has {out.numel()} elements of {out.dtype}")
    octets = tensor.view(-1).view(torch.uint8)
    out.zero_()
    if not by_kernel(tensor):
        _on_cpu(octets, out)
        return
    wide = octets.data_ptr() % 8 == 0
    block = _BLOCK if wide else _NARROW_BLOCK
    blocks = -(-octets.numel() // (8 * block))
    launch(
        kernels_of("digest").digest,
        min(max(blocks, 1), _MOST_PROGRAMS),
        tensor.device,
        octets,
        octets.numel(),
        out,
        WIDE=wide,
        BLOCK=block,
    )


def launch_digest(tensor: torch.Tensor) -> torch.Tensor:
    """As `digest_into` a new tensor, which `collect` takes."""
    out = torch.empty(2, dtype=torch.int64, device=tensor.device)
    digest_into(tensor.detach().contiguous(), out)
    return out


def collect(hashes: Sequence[torch.Tensor]) -> list[bytes]:
    """What `launch_digest` gave, as 16 bytes each.

    Waits for the current stream to get here, not for the device.
    """
    if not hashes:
        return []
    together = torch.stack(tuple(hashes))
    if together.is_cuda:
        with torch.cuda.device(together.device):
            landed = torch.empty(together.shape, dtype=torch.int64, pin_memory=True)
            landed.copy_(together, non_blocking=True)
            # One that blocks lets the thread sleep, and others run.
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream())
            arrived.synchronize()
        together = landed
    return [row.numpy().astype("<i8").tobytes() for row in together]


def digest(tensor: torch.Tensor) -> bytes:
    """16 bytes over a tensor's elements; waits for the current stream to get here.

    Raises:
        SetupError: as `digest_into`.
    """
    return collect([launch_digest(tensor)])[0]


def _on_cpu(octets: torch.Tensor, out: torch.Tensor) -> None:
    size_bytes = octets.numel()
    whole = size_bytes // 8
    head = torch.zeros(2, dtype=torch.int64)
    head[0] = size_bytes
    head.view(torch.uint8)[8 : 8 + size_bytes % 8] = octets[whole * 8 :]
    out += _sums(head, 0)
    for start in range(0, whole, _CPU_BLOCK):
        block = octets[8 * start : 8 * min(start + _CPU_BLOCK, whole)]
        # A view as words must begin at a multiple of 8 bytes in its storage.
        words = block if block.storage_offset() % 8 == 0 else block.clone()
        out += _sums(words.view(torch.int64), start + 2)


def _sums(words: torch.Tensor, number: int) -> torch.Tensor:
    """What words, the first of them with this number, add to the hash: int64[2].

    Products of int64 are those of uint64 modulo 2^64, but int64 is shifted with its sign.
    """
    places = torch.arange(number, number + words.numel()) * _signed(PLACE) + _signed(SEED)
    mixed = words ^ places
    mixed = (mixed ^ _shifted(mixed, 32)) * _signed(WORD)
    mixed = mixed ^ _shifted(mixed, 29)
    first = mixed * _signed(FIRST)
    second = (mixed ^ _signed(TURN)) * _signed(SECOND)
    return torch.stack(((first ^ _shifted(first, 32)).sum(), (second ^ _shifted(second, 31)).sum()))


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words >> bits) & ((1 << 64 - bits) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
