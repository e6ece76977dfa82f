"""What the workers of the recovery and goodput benchmarks do: train, and note when they do what.

Times are of CLOCK_MONOTONIC, which all processes of a machine share. Each worker appends lines to a file of
its own, so that what it noted outlives it; `watched_job` reads them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ringps
from models import Workload, gpt_workload, mlp_workload
from ringps import probe, worker_env

SAMPLES, GLOBAL_BATCH, LEARNING_RATE = 4096, 16, 1e-4
CUT_SIGNAL = signal.SIGUSR1
"""Has a worker close the data connection over which it sends next."""
WORKLOADS = {
    one.name: one
    for one in (
        gpt_workload("gpt-small", width=192, layers=4, context=32, batch=SAMPLES),
        mlp_workload("mlp-30mb", width=1024, layers=7, batch=SAMPLES),
        mlp_workload("mlp-400mb", width=2048, layers=8, batch=SAMPLES),
        gpt_workload("gpt-mini", width=32, layers=1, context=16, batch=SAMPLES),
    )
}
"""By name; each draws the whole dataset at once. A transformer of 1.8 million parameters; gradients of 30 MB;
parameters and AdamW's state of 400 MB; one for trying out."""
_NOTED = frozenset({"prepare", "connected", "offer", "fed"})


class Place(Protocol):
    """Memory to train in that is not the CPU's."""

    def adopt(self, model: torch.nn.Module) -> None:
        """Move a model there; its parameters stay the same objects."""

    def inputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """A part of a batch, where the model wants it."""


class Notebook:
    """What a worker notes: a line at a time, of which none is lost when it is killed."""

    def __init__(self, directory: Path, worker_id: int) -> None:
        path = directory / f"{worker_id}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, what: str, **details: object) -> None:
        """Note that it happens now."""
        line = json.dumps({"t_s": time.monotonic(), "what": what, **details})
        os.write(self._file, line.encode() + b"\n")


class Training:
    """A model in training: the same whatever makes it parallel."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: one of `WORKLOADS`.
        """
        torch.set_num_threads(1)
        torch.manual_seed(0)
        workload: Workload = WORKLOADS[name]
        inputs, targets = workload.draw(torch.Generator().manual_seed(0))
        self.samples = TensorDataset(inputs, targets.view(len(inputs), -1))
        self.model = workload.build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @staticmethod
    def step(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...]
    ) -> None:
        """One step with this rank's share of the global batch."""
        inputs, targets = batch
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(model(inputs), targets.flatten())
        loss.backward()
        optimizer.step()


def train(
    directory: Path,
    name: str,
    costs: Callable[[], Mapping[str, float]] | None = None,
    place: Callable[[], Place] | None = None,
) -> None:
    """Train until the job is stopped, as a worker of `ringps run`.

    Args:
        directory: for the notes.
        name: of the workload.
        costs: more to note of each step.
        place: where to train, once the ring is joined; in the CPU's memory if None.
    """
    env = worker_env.read()
    assert env is not None, "`ringps run` starts this"
    notebook = Notebook(directory, env.worker_id)
    notebook.note("started", start_s=process_start_s())
    _listen(notebook, costs or dict)
    ringps.init()
    training = Training(name)
    there = None if place is None else place()
    if there is not None:
        there.adopt(training.model)
    sampler = ringps.ElasticBatchSampler(len(training.samples), GLOBAL_BATCH, seed=0)
    optimizer = ringps.DistributedOptimizer(training.optimizer, training.model, sampler=sampler)
    state = ringps.TrainState(model=training.model, optimizer=optimizer, sampler=sampler)
    loader = DataLoader(training.samples, batch_sampler=sampler)
    notebook.note("ready", parameter_bytes=training.parameter_bytes)
    for step, batch in state.steps(loader, until=1_000_000):
        if there is not None:
            batch = tuple(there.inputs(tensor) for tensor in batch)
        training.step(training.model, optimizer, batch)
        data = sampler.statistics()
        trained = data.epoch * len(training.samples) + data.trained_samples
        notebook.note("trained", step=step, samples=trained)
    ringps.shutdown()


def process_start_s() -> float:
    """When this process was started, on the monotonic clock, to 10 ms."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot_s = started / os.sysconf("SC_CLK_TCK")
    return since_boot_s + time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _listen(notebook: Notebook, costs: Callable[[], Mapping[str, float]]) -> None:
    fetching, to_cut = threading.Event(), threading.Event()
    signal.signal(CUT_SIGNAL, lambda *_: to_cut.set())

    def listener(point: str, passed: dict[str, Any]) -> None:
        if point == "committed":
            place = {"generation": ringps.generation(), "rank": ringps.rank(), "n": ringps.world_size()}
            notebook.note(point, step=passed["step"], **place, **costs())
        elif point in _NOTED:
            notebook.note(point, **passed)
        elif point == "fetch" and not fetching.is_set():
            fetching.set()
            notebook.note(point)
        elif point == "chunk" and to_cut.is_set():
            to_cut.clear()
            notebook.note("cut", peer=passed["peer"])
            for connection in passed["outgoing"]:
                connection.shutdown(socket.SHUT_RDWR)

    probe.listener = listener
