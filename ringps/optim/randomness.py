"""The random number generators of a process: their states, and how a loader's iterator leaves them alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

_SEED_BYTES = 8


def capture(loader: object = None, tensors: Iterable[torch.Tensor] = ()) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and CUDA's global generators, and of a loader's own.

    Args:
        loader: a `DataLoader`, perhaps with a `generator`.
        tensors: of the model. CUDA's generators are those of the GPUs that they are on, and of the current
            one if this process uses CUDA at all.

    Returns:
        Plain values and tensors, in memory of their own.
    """
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "python": [version, np.array(words, np.uint32), gauss],  # 625 numbers take long to save one by one
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if gpus := _gpus(tensors):
        found["cuda"] = [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    generator = _generator_of(loader)
    if generator is not None:
        found["loader"] = generator.get_state()
    return found


def restore(captured: dict[str, Any], loader: object = None, tensors: Iterable[torch.Tensor] = ()) -> None:
    """Go on from what `capture` gave for a loader and model like these.

    The worker's GPU may have another number than it had, and the machine more or fewer of them. The generator
    of a GPU that was not captured stays as it is.
    """
    version, words, gauss = captured["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(captured["numpy"])
    torch.set_rng_state(captured["torch"].clone())
    for gpu, state in zip(_gpus(tensors), captured.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(state.clone(), gpu)
    generator = _generator_of(loader)
    if generator is not None and "loader" in captured:
        generator.set_state(captured["loader"].clone())


def seed_apart(captured: dict[str, Any], rank: int) -> None:
    """Seed all global generators for a rank that has no state of its own, from another's and its number."""
    seed = _derive(captured["torch"].numpy().tobytes(), rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def for_iterator(loader: object, step: int, rank: int) -> Iterator[None]:
    """While a loader's iterator is made: what it draws, the seed of its workers, depends on nothing but the
    seed of this process, the step and the rank, and leaves what others draw as it is.

    So a run that makes an iterator in the middle of an epoch goes on like one that had made it before.
    """
    generators = [torch.default_generator]
    if (own := _generator_of(loader)) is not None:
        generators.append(own)
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(_derive(str(generator.initial_seed()).encode(), step, rank))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _gpus(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """Those of the model first, in its order: by their places in this list the same ones find each other on
    another machine. Does not start CUDA."""
    found = [tensor.device for tensor in tensors if tensor.is_cuda]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.append(torch.device("cuda", torch.cuda.current_device()))
    return list(dict.fromkeys(found))


def _generator_of(loader: object) -> torch.Generator | None:
    generator = getattr(loader, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def _derive(root: bytes, *numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    # Non-negative as a signed number of 64 bits, which is what torch takes.
    return int.from_bytes(blake2b(root + b"," + text, digest_size=_SEED_BYTES).digest(), "little") >> 1
