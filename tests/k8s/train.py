"""A training script for pods, shipped with `--file`: it writes down what it trains and what is committed.

Each process appends lines of JSON to a file of its own on the volume at /data: `start`, `batch` before each
step, `commit` when it has committed one (who took part, and with how many samples of which epoch), `end`.
"""

import argparse
import json
import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ringps
from ringps import probe
from ringps.collectives import current
from ringps.kernels.digest import digest

SAMPLES, BATCH = 203, 16

parser = argparse.ArgumentParser()
parser.add_argument("--until", type=int, default=1_000_000, help="the last step; or once /data/GO is there")
parser.add_argument("--every", type=int, default=20)
parser.add_argument("--step-s", type=float, default=0.05)
options = parser.parse_args()
torch.set_num_threads(1)
pod = os.environ["POD_NAME"]
worker_id = int(os.environ["RINGPS_WORKER_ID"])
path = f"/data/ledger-{worker_id}-{pod}-{os.getpid()}.jsonl"
ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
voters: list[tuple[int, str, int]] = []


def note(kind: str, **details: object) -> None:
    line = {"t": time.time(), "kind": kind, "who": [worker_id, pod, os.getpid()], **details}
    os.write(ledger, (json.dumps(line) + "\n").encode())


def listen(point: str, passed: dict[str, object]) -> None:
    if point == "vote":
        voters[:] = [(member.worker_id, member.host, member.pid) for member in current().generation.members]
    elif point == "committed":
        note("commit", step=passed["step"], voters=voters, account=passed["account"])


note("start")
ringps.init()
probe.listener = listen
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 1))
inputs = torch.randn(SAMPLES, 8)
data = TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(SAMPLES))
sampler = ringps.ElasticBatchSampler(SAMPLES, BATCH, seed=1)
loader = DataLoader(data, batch_sampler=sampler)
opt = ringps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sampler=sampler)
state = ringps.TrainState(model=model, optimizer=opt, sampler=sampler)
with ringps.Checkpointer(None, state, every_steps=options.every) as ckpt:
    note("restored", step=ckpt.restored_step or 0)
    for step, (batch, targets, indices) in ckpt.steps(loader, until=options.until):
        time.sleep(options.step_s)
        note("batch", step=step, samples=indices.tolist(), world=ringps.world_size(), rank=ringps.rank())
        opt.zero_grad()
        (model(batch) - targets).square().mean().backward()
        opt.step()
        if step % 20 == 0:
            print("step", step, "of", ringps.world_size(), flush=True)
        if options.until == 1_000_000:
            go = torch.tensor([float(os.path.exists("/data/GO"))])
            ringps.all_reduce(go, "max")
            if go[0]:
                break
note("end", step=step, digest=digest(*model.parameters()).hex())
print("end", step, flush=True)
ringps.shutdown()
