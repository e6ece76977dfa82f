"""A small training script for tests of elastic jobs, and what must be true of what it wrote down.

Each process appends lines of JSON to a file of its own: `environ` (its launch contract), `batch` before
each step, `commit` when it has committed one (who took part, and what samples each contributed), `end`. The
job ends at the first step after the file GO is there, which the ranks agree on by a collective of their own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

TRAIN = """
import argparse, json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import ringps
from ringps import probe
from ringps.collectives import current
from ringps.kernels.digest import digest

parser = argparse.ArgumentParser()
parser.add_argument("directory")
parser.add_argument("--until", type=int, default=1_000_000)
parser.add_argument("--width", type=int, default=24)
parser.add_argument("--optimizer", default="AdamW")
parser.add_argument("--loaders", type=int, default=0)
parser.add_argument("--scaled", action="store_true")
parser.add_argument("--hangs-at", type=int, help="step in which the first worker 1 goes no further")
options = parser.parse_args()
torch.set_num_threads(1)
ringps.init()
assert ringps.local_rank() == int(os.environ["RINGPS_LOCAL_RANK"])
own = f"{options.directory}/ledger-{ringps.worker_id()}-{os.getpid()}.jsonl"
ledger = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
voters = []

def note(kind, **details):
    os.write(ledger, (json.dumps({"kind": kind, **details}) + "\\n").encode())

def listen(point, passed):
    if point == "vote":
        voters[:] = [(member.worker_id, member.pid) for member in current().generation.members]
    elif point == "committed":
        note("commit", step=passed["step"], voters=voters, account=passed["account"])

probe.listener = listen
note("environ", environ={name: value for name, value in os.environ.items() if name.startswith("RINGPS_")})
torch.manual_seed(0)
SAMPLES, BATCH, width = 203, 16, options.width
layers = [nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1)]
if options.scaled:
    layers.insert(2, nn.Dropout(0.2))
model = nn.Sequential(*layers)
inputs = torch.randn(SAMPLES, 8)
data = TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(SAMPLES))
sampler = ringps.ElasticBatchSampler(SAMPLES, BATCH, seed=1)
loader = DataLoader(data, batch_sampler=sampler, num_workers=options.loaders,
                    persistent_workers=options.loaders > 0)
inner = getattr(torch.optim, options.optimizer)(model.parameters(), lr=1e-2)
opt = ringps.DistributedOptimizer(inner, model, sampler=sampler)
schedule = torch.optim.lr_scheduler.StepLR(opt, 50, gamma=0.9)
scaler = torch.amp.GradScaler("cpu", enabled=options.scaled, init_scale=64.0, growth_interval=20)
state = ringps.TrainState(model=model, optimizer=opt, sampler=sampler, scheduler=schedule, scaler=scaler)
torch.manual_seed(os.getpid())  # each process's dropout
seen = 0
for step, (batch, targets, indices) in state.steps(loader, until=options.until):
    time.sleep(0.01)
    note("batch", step=step, samples=indices.tolist())
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    while step == options.hangs_at and ringps.worker_id() == 1 and first_life:
        signal.pause()
    loss = (model(batch) - targets).square().mean()
    opt.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    schedule.step()
    if ringps.world_size() != seen or step % 20 == 0:
        seen = ringps.world_size()
        print("pid", os.getpid(), "of", seen, "at step", step, "rank", ringps.rank(), flush=True)
    stop = torch.tensor([float(os.path.exists(f"{options.directory}/GO")), float(loss.detach())])
    ringps.all_reduce(stop, "max")
    if stop[0]:
        break
note("end", step=step, digest=digest(*model.parameters()).hex(), schedule=schedule.last_epoch,
     lr=schedule.get_last_lr(), scale=scaler.get_scale() if options.scaled else 1.0, loss=float(stop[1]))
print("end of", ringps.world_size(), flush=True)
ringps.shutdown()
"""

SAMPLES, BATCH = 203, 16

Process = tuple[int, int]
"""Worker id, and process id."""


class Ledgers:
    """All that the processes of a job wrote down."""

    def __init__(self, directory: Path) -> None:
        self.lines: dict[Process, list[dict[str, Any]]] = {}
        for path in directory.glob("ledger-*.jsonl"):
            _, worker_id, pid = path.stem.split("-")
            found = [json.loads(line) for line in path.read_text().splitlines()]
            self.lines[int(worker_id), int(pid)] = found

    def of(self, kind: str) -> dict[Process, list[dict[str, Any]]]:
        return {who: [one for one in lines if one["kind"] == kind] for who, lines in self.lines.items()}

    def check(self, *, ended: bool = True) -> dict[int, dict[str, Any]]:
        """Steps 1 to the last were committed once each, alike, and trained each epoch's samples once.

        Returns:
            A commit of each step.
        """
        commits: dict[int, dict[str, Any]] = {}
        for who, own in self.of("commit").items():
            steps = [line["step"] for line in own]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True, (who, steps)
            for line in own:
                assert commits.setdefault(line["step"], line) == line, (who, line)
        assert sorted(commits) == list(range(1, len(commits) + 1))
        self._check_samples(commits)
        ends = [line for lines in self.of("end").values() for line in lines]
        assert bool(ends) == ended
        if not ended:
            return commits
        assert all(end == ends[0] for end in ends), ends
        assert ends[0]["step"] == len(commits) == ends[0]["schedule"]
        return commits

    def _check_samples(self, commits: dict[int, dict[str, Any]]) -> None:
        drawn = {
            (who, line["step"]): line["samples"] for who, own in self.of("batch").items() for line in own
        }
        epochs: dict[int, list[int]] = {}
        for step, commit in sorted(commits.items()):
            for voter, [row] in zip(commit["voters"], commit["account"], strict=True):
                if row[-1]:
                    assert len(drawn[tuple(voter), step]) == row[-1], (step, voter)
                    epochs.setdefault(row[0], []).extend(drawn[tuple(voter), step])
        for epoch, samples in epochs.items():
            counts = Counter(samples)
            assert set(counts.values()) == {1}, (
                f"epoch {epoch}: trained more than once: {counts.most_common(5)}"
            )
            # The last one is not finished, nor is the one before if a sample of it went on to the last.
            assert epoch >= max(epochs) - 1 or len(counts) == SAMPLES, f"epoch {epoch}: {len(counts)} samples"

    def batch_sizes(self, commits: dict[int, dict[str, Any]]) -> dict[int, int]:
        """Samples by step."""
        return {step: sum(row[-1] for [row] in commit["account"]) for step, commit in commits.items()}
