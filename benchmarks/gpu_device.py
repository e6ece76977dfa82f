"""What the GPU benchmark measures on: a GPU, or, to rehearse the scripts, one that is pretended."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

import report
import ringps
from report import MIB
from ringps import device
from ringps.collectives import current
from ringps.testing.pretend import PretendAccelerator

_HEAD_START_CYCLES = 4_000_000
"""About two milliseconds."""
_LEAST_BYTES, _SMALLER = 4096, 4096

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """What came of calling something, a number per repetition."""

    device_s: list[float]
    """How long the device worked."""
    host_s: list[float]
    """How long the call took to return."""


class Card(Protocol):
    """The device, and how time is taken on it."""

    rehearsal: bool

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor's values on the device."""

    def shared(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device's that peers can open, by `ringps.empty`."""

    def adopt(self, model: nn.Module) -> None:
        """Move a model there; its parameters stay the same objects."""

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch, where a model on the device wants it."""

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """Flat uint8 memory of the host that the device copies from and to without a detour."""

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass is in bfloat16."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def beside(self, *calls: Call) -> Call:
        """A call that has the device do all of them at once."""

    def timed(self, calls: Sequence[Call], repeats: int) -> Times:
        """Call them in turn, `repeats` times in all, once each has warmed up; they only put work in."""

    def size(self, full_bytes: int) -> int:
        """How large to make what is to have `full_bytes`."""

    def repeats(self, full: int) -> int:
        """How often to do what is to be done `full` times."""

    def facts(self) -> dict[str, object]:
        """Which device and which software of its, for a row's `env`."""


class Gpu:
    """This worker's GPU, by torch.cuda."""

    rehearsal = False

    def __init__(self, index: int = 0) -> None:
        """
        Args:
            index: of the GPUs that this process sees.
        """
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def shared(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return ringps.empty(numel, dtype, self.device)

    def adopt(self, model: nn.Module) -> None:
        model.to(self.device)

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.ones(size_bytes, dtype=torch.uint8).pin_memory()

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def beside(self, *calls: Call) -> Call:
        streams = [torch.cuda.Stream() for _ in calls]  # type: ignore[no-untyped-call]

        def together() -> None:
            here = torch.cuda.current_stream()
            for stream, call in zip(streams, calls, strict=True):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    call()
            for stream in streams:
                here.wait_stream(stream)

        return together

    def timed(self, calls: Sequence[Call], repeats: int) -> Times:
        for call in [*calls, *calls]:
            call()
        torch.cuda.synchronize()
        marks, host_s = [], []
        for number in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            # The device is busy until the call has returned, so that it never waits for the host.
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            start_s = time.perf_counter()
            calls[number % len(calls)]()
            host_s.append(time.perf_counter() - start_s)
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return Times([begin.elapsed_time(end) / 1e3 for begin, end in marks], host_s)

    def size(self, full_bytes: int) -> int:
        return full_bytes

    def repeats(self, full: int) -> int:
        return full

    def facts(self) -> dict[str, object]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": found.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": found.total_memory,
            "l2_bytes": getattr(found, "L2_cache_size", None),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "nccl": _nccl_version(),
            "triton": _triton_version(),
        }


class Rehearsal:
    """A pretended GPU: the same calls, on small sizes, by the wall clock. What it measures means nothing."""

    rehearsal = True

    def __init__(self) -> None:
        self._pretended = PretendAccelerator("the only one")
        device.use(self._pretended)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pretended.copy(tensor)

    def shared(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return current().empty_beside(self.copy(torch.zeros(1)), numel, dtype)

    def adopt(self, model: nn.Module) -> None:
        self._pretended.adopt(model)

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.ones(size_bytes, dtype=torch.uint8)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def synchronize(self) -> None:
        """The script's own work is done when its calls return."""

    def beside(self, *calls: Call) -> Call:
        def together() -> None:
            for call in calls:
                call()

        return together

    def timed(self, calls: Sequence[Call], repeats: int) -> Times:
        times_s = []
        for number in range(repeats):
            start_s = time.perf_counter()
            calls[number % len(calls)]()
            times_s.append(time.perf_counter() - start_s)
        return Times(times_s, times_s)

    def size(self, full_bytes: int) -> int:
        return max(_LEAST_BYTES, full_bytes // _SMALLER // _LEAST_BYTES * _LEAST_BYTES)

    def repeats(self, full: int) -> int:
        return min(full, 2)

    def facts(self) -> dict[str, object]:
        return {"gpu": "pretended", "gpus": 1}


def card(rehearse: bool, index: int = 0) -> Card:
    """What to measure on. `index`: which GPU."""
    return Rehearsal() if rehearse else Gpu(index)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every part can be told."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--rehearse", action="store_true", help="at tiny sizes, on a pretended GPU")


def fill(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normally distributed, on the CPU."""
    block = torch.randn(min(numel, MIB), generator=torch.Generator().manual_seed(seed))
    return block.repeat(-(-numel // block.numel()))[:numel].to(dtype)


def commit() -> str:
    """Of the working tree, as `report.environment` has it."""
    return str(report.environment()["commit"] or "unknown")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return said.strip().partition("\n")[0]


def _nccl_version() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError):
        return None  # torch was built without it


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
