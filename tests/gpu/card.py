"""The GPU of a test: a real one, or with RINGPS_TEST_PRETEND=1 a pretended one, to see that a test runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ringps import device
from ringps.testing.pretend import PretendAccelerator

PRETEND = os.environ.get("RINGPS_TEST_PRETEND") == "1"
COUNT = 1 if PRETEND else torch.cuda.device_count()
"""GPUs of this machine."""
BUSY_CYCLES = 100_000_000
"""About 50 ms."""


class Card:
    """Where a worker's tensors and model are."""

    def __init__(self, index: int = 0) -> None:
        """
        Args:
            index: of the GPUs that this process sees.
        """
        self.type = "cpu" if PRETEND else "cuda"
        """As torch calls it."""
        self._device = torch.device("cuda", index)
        if PRETEND:
            self._pretended = PretendAccelerator("the only one", seed=os.getpid())
            device.use(self._pretended)
        else:
            torch.cuda.set_device(self._device)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values there, with the same strides if it is dense."""
        if not PRETEND:
            return tensor.detach().to(self._device)
        flat = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
        there = self._pretended.copy(flat.as_strided((flat.numel(),), (1,)))
        return there.as_strided(tensor.shape, tensor.stride())

    def adopt(self, model: torch.nn.Module) -> None:
        """Move a model there; its parameters stay the same objects."""
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = self.copy(tensor)

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch, where a model there wants it."""
        return tensor if PRETEND else tensor.to(self._device)

    def busy(self) -> None:
        """Have the current stream do nothing for a while."""
        if not PRETEND:
            torch.cuda._sleep(BUSY_CYCLES)

    @contextmanager
    def other_stream(self) -> Iterator[torch.cuda.Stream | None]:
        """What is put in within goes in another stream, behind the work of the current one; which (None if
        it is pretended)."""
        if PRETEND:
            yield None
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
