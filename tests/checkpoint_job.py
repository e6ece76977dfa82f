"""Scripts that train and save, in this process and as jobs, and an independent look at what they saved.

`Script` is a script's objects in a ring of one. `TRAIN` is a script for `ringps run`: each process appends
lines of JSON to a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, TensorDataset

import ringps
from ringps.kernels.digest import digest
from tests.training import filled, numbers

SAMPLES, BATCH = 24, 5


class Script:
    """A script's objects: all kinds of state that there are."""

    def __init__(
        self,
        seed: int = 0,
        *,
        loaders: int = 0,
        width: int = 4,
        samples: int = SAMPLES,
        batch: int = BATCH,
        accumulate_steps: int = 1,
        scheduled: bool = True,
        **others: Any,
    ) -> None:
        self.model = torch.nn.Sequential(
            filled(torch.nn.Linear(3, width), seed),
            torch.nn.BatchNorm1d(width),
            torch.nn.Dropout(0.3),
            filled(torch.nn.Linear(width, 1), seed),
        )
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sampler = ringps.ElasticBatchSampler(samples, batch, seed=2)
        self.optimizer = ringps.DistributedOptimizer(
            inner, self.model, sampler=self.sampler, accumulate_steps=accumulate_steps
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.loader = DataLoader(
            TensorDataset(numbers(samples, 3, dtype=torch.float32), torch.arange(samples)),
            batch_sampler=self.sampler,
            num_workers=loaders,
            generator=torch.Generator().manual_seed(seed),
        )
        self.state = ringps.TrainState(
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.sampler,
            scheduler=self.schedule if scheduled else None,
            scaler=self.scaler,
            **others,
        )

    def train(self, inputs: torch.Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(inputs).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    def parameters(self) -> str:
        """A hash of the model's parameters, which all ranks have alike."""
        return digest_of(dict(self.model.named_parameters()))

    def draw(self) -> list[float]:
        """A random number of each generator."""
        assert isinstance(self.loader.generator, torch.Generator)
        return [
            random.random(),
            float(np.random.random()),
            float(torch.rand(())),
            float(torch.rand((), generator=self.loader.generator)),
        ]


def settle() -> None:
    """Wait until nobody writes."""
    for thread in threading.enumerate():
        if thread.name in ("ringps-save", "ringps-upload", "ringps-arena"):
            thread.join(30)
            assert not thread.is_alive()


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of tensors, whatever their order."""
    return digest(*(tensors[name] for name in sorted(tensors))).hex()


class Whole(NamedTuple):
    """A checkpoint that is whole, as its files alone tell."""

    step: int
    run: int
    path: Path
    weights: dict[str, torch.Tensor]


def whole(directory: Path) -> list[Whole]:
    """The whole checkpoints in a directory, oldest first; found without ringps.

    Each file must have the size and hash that the manifest says, and the manifest its own.
    """
    found = [one for path in directory.glob("step-*.*") if (one := _if_whole(path)) is not None]
    return sorted(found, key=lambda one: (one.step, one.run))


def _if_whole(path: Path) -> Whole | None:
    try:
        raw = (path / "manifest.json").read_bytes()
        body, _, ending = raw.rpartition(b',\n  "hash": ')
        manifest = json.loads(raw)
    except (OSError, ValueError):
        return None
    own = hashlib.blake2b(body, digest_size=16).hexdigest()
    if ending != f'"{own}"\n}}\n'.encode() or f"step-{manifest['step']:08}.{manifest['run']}" != path.name:
        return None
    from safetensors.torch import load_file  # the children of a nursery do without

    weights: dict[str, torch.Tensor] = {}
    for entry in manifest["files"]:
        try:
            content = (path / entry["name"]).read_bytes()
        except OSError:
            return None
        if (len(content), xxhash.xxh3_128_hexdigest(content)) != (entry["size_bytes"], entry["digest"]):
            return None
        if entry["kind"] == "weights":
            weights.update(load_file(path / entry["name"]))
    return Whole(manifest["step"], manifest["run"], path, weights)


MORTAL = """
import os, random, signal, sys, threading
import torch
import ringps
from ringps import probe
from ringps.checkpoint import files, local_store
from tests.checkpoint_job import Script, seed_all, settle

_, directory, durable, seed, until, every = sys.argv
draw = random.Random(int(seed))
left = draw.randrange(1, 350) if int(seed) else 0
lock = threading.Lock()
rank = int(os.environ.get("RINGPS_WORKER_ID", "0"))
ledger = os.open(f"{directory}.ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def note(*words):
    os.write(ledger, (" ".join(map(str, words)) + "\\n").encode())

def moment(*what):
    global left
    with lock:
        left -= 1
        if left == 0:
            note("killed", rank, *what)
            os.kill(os.getpid(), getattr(signal, os.environ.get("MORTAL_SIGNAL", "SIGKILL")))

def watched(name):
    inner = getattr(os, name)
    def call(*arguments, **options):
        moment("before", name)
        result = inner(*arguments, **options)
        moment("after", name)
        return result
    setattr(os, name, call)

def listen(point, passed):
    if point == "saved":
        note("saved", passed["saved"], passed["lane"])
    if point in ("save_write", "save_publish", "saved", "restore", "boundary"):
        moment(point, *(str(passed[name]) for name in ("path", "stage", "written") if name in passed))

for name in ("rename", "unlink", "rmdir", "mkdir"):
    watched(name)
os.fsync = lambda descriptor: moment("at fsync")  # the machine goes on, only the process does not
files.BLOCK_BYTES, local_store._WRITE_BYTES = 512, 128  # so that files are cut off in the middle
probe.listener = listen
torch.set_num_threads(1)
seed_all(1)
ringps.init()
script = Script()
with ringps.Checkpointer(
    directory,
    script.state,
    every_steps=int(every),
    durable=durable or None,
    retention=ringps.Retention(keep=2),
) as ckpt:
    note("restored", ckpt.restored_step or 0, script.parameters())
    for step, (inputs, _) in ckpt.steps(script.loader, until=int(until)):
        script.train(inputs)
        note("step", step, script.parameters())
        if int(seed) and draw.random() < 0.7:
            settle()
ringps.shutdown()
"""
"""Trains and saves, and kills (or stops) itself at a random one of the moments that it passes through: blocks
that are written, stages of publishing, and everything that it does to directories when it claims, publishes
and deletes. With the seed 0 it lives. What it notes in a file beside the directory is there at once."""

TRAIN = """
import argparse, json, os, re, signal, threading, time
from pathlib import Path
import torch
import ringps
from ringps import probe
from ringps.checkpoint.tree import flatten
from ringps.kernels.digest import digest
from tests.checkpoint_job import Script, seed_all, settle

parser = argparse.ArgumentParser()
parser.add_argument("directory", type=Path)
parser.add_argument("ckpt")
parser.add_argument("--durable")
parser.add_argument("--until", type=int, default=100_000)
parser.add_argument("--every", type=int, default=4)
parser.add_argument("--loaders", type=int, default=0)
parser.add_argument("--hold", type=int, default=100_000, help="saves of later steps hang")
parser.add_argument("--die-at", type=int, help="all but rank 0 kill themselves, in their first life")
parser.add_argument("--slow", action="store_true")
parser.add_argument("--through", help="sizes of the ring, such as 3,2,3, after which the job ends")
options = parser.parse_args()
faults, restart = probe.listener, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
torch.set_num_threads(1)
seed_all(1)
ringps.init()
own = options.directory / f"ledger-{ringps.worker_id()}-{os.getpid()}.jsonl"
ledger = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def note(kind, **details):
    os.write(ledger, (json.dumps({"kind": kind, "t": time.time(), **details}) + "\\n").encode())

def listen(point, passed):
    found = re.search(r"step-(\\d+)", passed.get("path", "")) if point == "save_write" else None
    if found and int(found[1]) >= options.hold:
        print("held", flush=True)
        threading.Event().wait()
    if point == "saved":
        note("saved", step=passed["saved"], lane=passed["lane"])
    if faults is not None:
        faults(point, passed)

probe.listener = listen
script = Script(loaders=options.loaders, samples=203, batch=16)
if options.through:
    script.model[1].eval()  # a joining rank has one sample, which does not count
sizes, since = [], 0
saving = ringps.Saving(stop_window_s=0.2)
where = options.ckpt.format(worker=ringps.worker_id())
with ringps.Checkpointer(
    where, script.state, every_steps=options.every, durable=options.durable, saving=saving
) as ckpt:
    note("restored", step=ckpt.restored_step)
    for step, (inputs, samples) in ckpt.steps(script.loader, until=options.until):
        note("batch", step=step, samples=samples.tolist())
        if options.slow:
            time.sleep(0.02)
        if step == options.die_at and restart == "0" and ringps.rank() >= 1:
            os.kill(os.getpid(), signal.SIGKILL)
        script.train(inputs)
        note("step", step=step, parameters=script.parameters())
        if step % 10 == 0:
            print("at step", step, "pid", os.getpid(), "of", ringps.world_size(), flush=True)
        if step < options.hold:
            settle()  # so that nothing depends on who is faster
        if not sizes or sizes[-1] != ringps.world_size():
            sizes.append(ringps.world_size())
            since = step
        if options.through:
            ends = torch.tensor([float(",".join(map(str, sizes)) == options.through and step >= since + 12)])
            ringps.all_reduce(ends, "max")  # a new rank has not seen them all
            if ends:
                break
state = flatten(script.state.state_dict())
note("end", rank=ringps.rank(), digest=digest(*state.tensors).hex(), rest=digest(
    torch.frombuffer(bytearray(state.skeleton), dtype=torch.uint8)).hex(), draws=script.draw())
ringps.shutdown()
"""
"""A script for `ringps run`, and for a nursery."""


class Ledgers:
    """What the processes of jobs on one directory wrote down."""

    def __init__(self, directory: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        """Oldest first."""
        for path in directory.glob("ledger-*.jsonl"):
            worker, pid = map(int, path.stem.split("-")[1:])
            for line in path.read_text().splitlines():
                self.lines.append({"worker": worker, "pid": pid, **json.loads(line)})
        self.lines.sort(key=lambda line: line["t"])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def samples(self) -> dict[int, dict[int, list[int]]]:
        """By step and worker, when the step was done last."""
        found: dict[int, dict[int, list[int]]] = {}
        for line in self.of("batch"):
            found.setdefault(line["step"], {})[line["worker"]] = line["samples"]
        return found

    @property
    def parameters(self) -> dict[int, set[str]]:
        """By step: all that processes had after it."""
        found: dict[int, set[str]] = {}
        for line in self.of("step"):
            found.setdefault(line["step"], set()).add(line["parameters"])
        return found

    @property
    def ends(self) -> dict[int, tuple[str, str, list[float]]]:
        """By rank: hashes of tensors and of all else, and random numbers."""
        return {line["rank"]: (line["digest"], line["rest"], line["draws"]) for line in self.of("end")}
