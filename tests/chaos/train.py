"""What a chaos campaign trains: a tiny model, with a record of every batch and every commit.

Every process writes lines of JSON to a file of its own, one write each:
`batch` (before it is trained: step and samples), `commit` (a step, who voted, and their account), `end`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ringps
from ringps import device, probe
from ringps.collectives import ElasticCommunicator, current
from ringps.kernels.digest import digest
from ringps.testing.pretend import PretendAccelerator

parser = argparse.ArgumentParser()
parser.add_argument("directory", type=Path)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--samples", type=int, default=203)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--compare-every", type=int, default=5)
parser.add_argument("--patience-s", type=float, default=0.1, help="how long a step waits for missing members")
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--save-every", type=int, default=5)
parser.add_argument(
    "--gpu",
    nargs="?",
    const="pretended",
    choices=("pretended", "cuda"),
    help="train on one that all workers share, a pretended one if nothing else is said",
)
options = parser.parse_args()

home = torch.device("cuda" if options.gpu == "cuda" else "cpu")
# CUDA takes seconds to start, in which the others would wait for this one.
torch.zeros(1, device=home)
ringps.init()
name = f"ledger-{ringps.worker_id()}-{os.getpid()}.jsonl"
ledger = os.open(options.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
faults = probe.listener
voters: list[tuple[int, int]] = []


def note(kind: str, **details: Any) -> None:
    os.write(
        ledger, (json.dumps({"kind": kind, "generation": ringps.generation(), **details}) + "\n").encode()
    )


def listen(point: str, passed: dict[str, Any]) -> None:
    if point == "vote":
        voters[:] = [(member.worker_id, member.pid) for member in current().generation.members]
    elif point == "committed":
        note("commit", step=passed["step"], voters=voters, account=passed["account"])
    if faults is not None:
        faults(point, passed)


def wait_for_the_missing() -> None:
    """Let a replacement come, or the job would be done before it is there."""
    ring = current()
    assert isinstance(ring, ElasticCommunicator)
    until_s = time.monotonic() + options.patience_s
    while ring.world_size < options.workers and time.monotonic() < until_s and not ring._membership.joiners():
        time.sleep(0.003)


probe.listener = listen
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
model.to(home)
if options.gpu == "pretended":
    gpu = PretendAccelerator("the only one", seed=os.getpid())
    device.use(gpu)
    gpu.adopt(model)
inputs = torch.randn(options.samples, 8)
data = TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(options.samples))
sampler = ringps.ElasticBatchSampler(len(data), options.batch, seed=1)
loader = DataLoader(data, batch_sampler=sampler)
opt = ringps.DistributedOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    model,
    sampler=sampler,
    bucket_cap_bytes=1024,
    first_bucket_bytes=128,
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, options.steps)
state = ringps.TrainState(model=model, optimizer=opt, sampler=sampler, scheduler=schedule)
loss = torch.tensor(float("nan"))
saving = ringps.Saving(stop_window_s=0.05)
checkpointer = ringps.Checkpointer(
    options.directory / "checkpoints", state, every_steps=options.save_every, saving=saving
)
with checkpointer as ckpt:
    for step, (batch, targets, indices) in ckpt.steps(loader, until=options.steps):
        wait_for_the_missing()
        note("batch", step=step, samples=indices.tolist())
        loss = (model(batch.to(home)) - targets.to(home)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % options.compare_every == 0:
            own = int.from_bytes(digest(*model.parameters())[:7], "little")
            least, most = torch.tensor([own]), torch.tensor([own])
            ringps.all_reduce(least, "min")
            ringps.all_reduce(most, "max")
            if int(least) != int(most):
                raise SystemExit(f"step {step}: ranks hold different parameters")
with torch.no_grad():
    final = float((model(inputs.to(home)).cpu() - inputs.sum(1, keepdim=True)).square().mean())
note("end", step=state.step, digest=digest(*model.parameters()).hex(), loss=final)
ringps.shutdown()
