"""The ways to save and to restore a training state that are compared, and the ceiling of each.

Every turn is collective and returns this rank's seconds. Each way keeps one checkpoint, and has it until the
next one is whole: so all of them use as much of the system's memory, old and new.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn import functional

import ringps
from models import GPT
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.pieces import allocate
from ringps.checkpoint.store import open_store
from ringps.checkpoint.tree import flatten
from ringps.collectives import current
from ringps.kernels.digest import digest
from ringps.optim.restoring import restore

RINGPS, TORCH, DCP, DCP_ASYNC, DCP_KEPT = "ringps", "torch.save", "dcp", "dcp-async", "dcp-async-kept"
COPY, WRITE, READ = "copy", "write", "read"
STALL, DURABLE, LOADED, APPLIED = "save_stall", "save_durable", "restore", "restore_into_model"

_BLOCK_BYTES = 4 * 1024 * 1024
_BATCHES = [None] * 4
"""What the loop between saves is given: it does not train."""


class Turn(NamedTuple):
    """One of the ways."""

    op: str
    backend: str
    run: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is saved: a GPT and AdamW's moments, as they are after one step. The same on all ranks."""

    model: torch.nn.Module
    optimizer: ringps.DistributedOptimizer
    state: ringps.TrainState

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tensors_of(self.state))

    def digest(self) -> bytes:
        """A hash of all tensors."""
        return digest(*tensors_of(self.state))

    def blank(self) -> None:
        """Forget all values."""
        with torch.no_grad():
            for tensor in tensors_of(self.state):
                tensor.zero_()


def subject(megabytes: float) -> Subject:
    """Build a state of about so many MB (10^6 bytes), more than 0.5. Collective."""
    width, context = (512 if megabytes >= 100 else 64), 16
    # Parameters of a layer; and each has two moments.
    layers = max(1, round(megabytes * 1e6 / (3 * 4) / (12 * width**2 + 13 * width)))
    torch.manual_seed(0)
    model = GPT(vocabulary=256, context=context, width=width, layers=layers, heads=4)
    optimizer = ringps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model)
    tokens = torch.randint(256, (1, context))
    loss: Any = functional.cross_entropy(model(tokens), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return Subject(
        model=model, optimizer=optimizer, state=ringps.TrainState(model=model, optimizer=optimizer)
    )


class Saves:
    """Turns that save."""

    def __init__(self, subject: Subject, keeper: ringps.Checkpointer, directory: Path) -> None:
        """
        Args:
            subject: what is saved.
            keeper: entered, with `Saving(final=False)` and `Retention(keep=1)`; the ring is fixed.
            directory: on the file system to which all write; `keeper`'s directory is in it.
        """
        self._state = subject.state
        self._keeper = keeper
        self._directory = directory
        self.own_stall_s: list[float] = []
        """What ringps itself says, for each of its stalls here."""
        share_bytes = -(-subject.size_bytes // ringps.world_size())
        # From memory as a model's is, into memory as ringps has.
        self._source, self._copied = torch.empty(share_bytes, dtype=torch.uint8), allocate(share_bytes)
        for memory in (self._source, self._copied):
            memory.fill_(1)
        # What it has copied into is used again, as ringps does; by default it is thrown away.
        self._kept_stager = DefaultStager(StagingOptions(False, False, False, False))

    def turns(self) -> list[Turn]:
        """In the order in which they are to be listed."""
        alone = ringps.world_size() == 1
        return [
            Turn(STALL, RINGPS, self._stall),
            Turn(STALL, TORCH, lambda: self._torch(durable=False)),
            *([Turn(STALL, DCP_ASYNC, self._dcp_async)] if alone else []),
            *([Turn(STALL, DCP_KEPT, lambda: self._dcp_async(self._kept_stager))] if alone else []),
            Turn(STALL, COPY, self._copy),
            Turn(DURABLE, RINGPS, self._durable),
            Turn(DURABLE, TORCH, lambda: self._torch(durable=True)),
            *([Turn(DURABLE, DCP, self._dcp)] if alone else []),
            Turn(DURABLE, WRITE, self._write),
        ]

    def _stall(self) -> float:
        """What a save adds to the time from one step to the next."""
        saved = self._keeper.statistics().saved
        steps = self._keeper.steps(_BATCHES, until=self._state.step + 3)
        next(steps)
        ringps.barrier()
        with _clock() as without:
            next(steps)
        self._keeper.save()
        ringps.barrier()
        with _clock() as with_save:
            next(steps)
        for _ in steps:  # ends when the checkpoint is whole
            pass
        self._check(saved + 1)
        self.own_stall_s.append(self._keeper.statistics().stall_s[-1])
        return with_save[0] - without[0]

    def _durable(self) -> float:
        saved = self._keeper.statistics().saved
        ringps.barrier()
        with _clock() as taken:
            self._keeper.save()
            for _ in self._keeper.steps(_BATCHES, until=self._state.step + 1):
                pass
        self._check(saved + 1)
        return taken[0]

    def _check(self, saved: int) -> None:
        if self._keeper.statistics().saved != saved:
            sys.exit(f"a checkpoint was not saved: {self._keeper.statistics()}")

    def _torch(self, *, durable: bool) -> float:
        """Rank 0 saves, and the others wait for it, as they would at their next collective operation."""
        path = self._directory / "state.pt"
        ringps.barrier()
        if ringps.rank() != 0:
            return 0.0
        with _clock() as taken:
            unfinished = path.with_suffix(".part")
            with open(unfinished, "wb") as file:
                torch.save(self._state.state_dict(), file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            unfinished.replace(path)
            if durable:
                _sync(self._directory)
        _sync(path)  # or the system would write it during the next turn
        return taken[0]

    def _dcp_async(self, stager: DefaultStager | None = None) -> float:
        """Until training may go on."""
        path = self._directory / "dcp-async"
        ringps.barrier()
        with _clock() as taken:
            future: Any = state_dict_saver.async_save(
                self._state.state_dict(), checkpoint_id=path, async_stager=stager, no_dist=True
            )
        future.result()
        shutil.rmtree(path)
        return taken[0]

    def _dcp(self) -> float:
        """By default DCP syncs its files; the directory is left to do."""
        path, former = self._directory / "dcp.part", self._directory / "dcp"
        ringps.barrier()
        with _clock() as taken:
            state_dict_saver.save(self._state.state_dict(), checkpoint_id=path, no_dist=True)
            _sync(path)
            shutil.rmtree(former, ignore_errors=True)
            path.rename(former)
            _sync(self._directory)
        return taken[0]

    def _copy(self) -> float:
        """Each rank copies its part of as many bytes, into memory that it has."""
        ringps.barrier()
        with _clock() as taken:
            self._copied.copy_(self._source)
        return taken[0]

    def _write(self) -> float:
        """Each rank writes its part of as many bytes."""
        path = self._directory / f"raw-{ringps.rank()}"
        ringps.barrier()
        with _clock() as taken:
            write_raw(path, self._source)
        path.unlink()
        return taken[0]


class Restores:
    """Turns that restore what was saved in a directory before, and is in the system's memory still."""

    def __init__(self, subject: Subject, checkpoints: Path, directory: Path) -> None:
        """Collective.

        Args:
            subject: what was saved; it gets back what it has now.
            checkpoints: ringps's directory; nobody saves there now.
            directory: for the files of others.
        """
        self._subject = subject
        self._checkpoints = checkpoints
        self._torch_path = directory / "state.pt"
        self._dcp_path = directory / "dcp"
        self._raw_path = directory / "raw"
        self._raw = allocate(subject.size_bytes)
        self._raw.fill_(1)
        self._wanted = subject.digest()
        if ringps.rank() == 0:
            torch.save(subject.state.state_dict(), self._torch_path)
            write_raw(self._raw_path, self._raw)
            if ringps.world_size() == 1:
                shutil.rmtree(self._dcp_path, ignore_errors=True)
                state_dict_saver.save(subject.state.state_dict(), checkpoint_id=self._dcp_path, no_dist=True)
            os.sync()
        ringps.barrier()

    def turns(self) -> list[Turn]:
        """In the order in which they are to be listed."""
        alone = ringps.world_size() == 1
        return [
            Turn(LOADED, RINGPS, self._loaded),
            Turn(LOADED, TORCH, self._torch_loaded),
            Turn(LOADED, READ, self._read),
            Turn(APPLIED, RINGPS, lambda: self._applied(self._enter)),
            Turn(APPLIED, TORCH, lambda: self._applied(self._torch)),
            *([Turn(APPLIED, DCP, lambda: self._applied(self._dcp))] if alone else []),
        ]

    def _loaded(self) -> float:
        ringps.barrier()
        with _clock() as taken:
            restored = restore(current(), [Directory(open_store(self._checkpoints))])
        if restored.contents is None or restored.skipped:
            sys.exit(f"the checkpoint was not restored: {restored.skipped}")
        return taken[0]

    def _torch_loaded(self) -> float:
        ringps.barrier()
        with _clock() as taken:
            loaded = self._load()
        del loaded
        return taken[0]

    def _load(self) -> Any:
        return torch.load(self._torch_path, weights_only=True, mmap=False)

    def _read(self) -> float:
        """Each rank reads as many bytes, into memory that it has."""
        ringps.barrier()
        with _clock() as taken, open(self._raw_path, "rb", buffering=0) as file:
            memory = self._raw.numpy().data
            for at in range(0, len(memory), _BLOCK_BYTES):
                file.readinto(memory[at : at + _BLOCK_BYTES])
        return taken[0]

    def _applied(self, apply: Callable[[], float]) -> float:
        self._subject.blank()
        ringps.barrier()
        taken_s = apply()
        if self._subject.digest() != self._wanted:
            sys.exit("what was restored is not what was saved")
        return taken_s

    def _enter(self) -> float:
        start_s = time.perf_counter()
        with (
            contextlib.redirect_stderr(io.StringIO()),  # it says that it goes on from there
            ringps.Checkpointer(self._checkpoints, self._subject.state),
        ):
            return time.perf_counter() - start_s

    def _torch(self) -> float:
        with _clock() as taken:
            self._subject.state.load_state_dict(self._load())
        return taken[0]

    def _dcp(self) -> float:
        """DCP reads into the tensors that are there; what else there is comes back beside them."""
        with _clock() as taken:
            found = self._subject.state.state_dict()
            state_dict_loader.load(found, checkpoint_id=self._dcp_path, no_dist=True)
            self._subject.state.load_state_dict(found)
        return taken[0]


def tensors_of(state: ringps.TrainState) -> list[torch.Tensor]:
    """All tensors, live."""
    return flatten(state.state_dict()).tensors


def write_raw(path: Path, memory: torch.Tensor) -> None:
    """Write bytes, and wait until they are on the disk."""
    raw = memory.numpy().data
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(raw), _BLOCK_BYTES):
            file.write(raw[at : at + _BLOCK_BYTES])
        os.fsync(file.fileno())


@contextlib.contextmanager
def _clock() -> Iterator[list[float]]:
    """A list that holds the seconds that the block took, once it is over."""
    taken: list[float] = []
    start_s = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - start_s)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
