"""Training steps with a save every so many, and without any, in turns within one job."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import report
import ringps
import variants
from checkpoint_turns import tensors_of
from models import WORKLOADS, gpt_workload

SAVING, NOT_SAVING = "ringps-saving", "ringps"
STEP = "train_step"

_MODELS = (gpt_workload("gpt-batch4", batch=4), WORKLOADS["gpt-tiny"], WORKLOADS["mlp"])
MODELS = {one.name: one for one in _MODELS}
"""What can be trained."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long."""

    every: int
    """Steps from one save to the next."""
    saves: int
    """In a block."""
    pairs: int
    """Of a block with saves and one without; every other pair begins with the one without."""

    @property
    def block(self) -> int:
        """Steps of a block."""
        return self.every * self.saves


@dataclass
class _Block:
    saving: bool
    seconds: float = 0.0
    whole: int = 0
    """Checkpoints that became whole in it."""
    stalls_s: list[float] = field(default_factory=list)


def measure(name: str, place: str, directory: Path, plan: Plan, transport: str) -> list[report.Row]:
    """Train, on all ranks; the rows are the same on all.

    Args:
        name: of `MODELS`.
        place: what to call the directory's file system.
        directory: an empty one.
        plan: how long.
        transport: of the ring, to be said.
    """
    workload = MODELS[name]
    torch.manual_seed(0)
    model = workload.build()
    optimizer = ringps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model)
    state = ringps.TrainState(model=model, optimizer=optimizer)
    batches = variants.batches(workload, ringps.rank())
    # The first block of either kind does not count.
    kinds = [True, False] + [saving for pair in range(plan.pairs) for saving in _order(pair)]
    blocks: list[_Block] = []
    with ringps.Checkpointer(directory, state, saving=ringps.Saving(final=False)) as keeper:
        start_s, before = time.perf_counter(), 0
        for step, (inputs, targets) in keeper.steps(batches, until=len(kinds) * plan.block + 1):
            number, within = divmod(step - 1, plan.block)
            if within == 0:
                now_s, done = time.perf_counter(), keeper.statistics()
                if blocks:
                    blocks[-1].seconds = now_s - start_s
                    blocks[-1].whole = done.saved - before
                    blocks[-1].stalls_s = list(done.stall_s[-blocks[-1].whole :])
                if number == len(kinds):
                    break
                blocks.append(_Block(kinds[number]))
                start_s, before = now_s, done.saved
            if blocks[-1].saving and within % plan.every == 0:
                keeper.save()
            loss: Any = functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _rows(blocks[2:], state, plan, {"transport": transport, "model": name, "place": place})


def _order(pair: int) -> tuple[bool, bool]:
    return (True, False) if pair % 2 == 0 else (False, True)


def _rows(
    blocks: Sequence[_Block], state: ringps.TrainState, plan: Plan, facts: dict[str, object]
) -> list[report.Row]:
    times_s = torch.tensor([block.seconds / plan.block for block in blocks], dtype=torch.float64)
    ringps.all_reduce(times_s, "max")
    by_kind: dict[bool, list[float]] = {True: [], False: []}
    for block, time_s in zip(blocks, times_s.tolist(), strict=True):
        by_kind[block.saving].append(time_s)
    saving = [block for block in blocks if block.saving]
    stalls_s = [stall for block in saving for stall in block.stalls_s]
    # Pairs, for what else the machine does changes slowly.
    lost = [1 - without / with_saves for with_saves, without in zip(*by_kind.values(), strict=True)]
    found = {
        "every": plan.every,
        "saves_asked": plan.saves * len(saving),
        "saves_whole": sum(block.whole for block in saving),
        "stall_ms": round(statistics.median(stalls_s) * 1e3, 2) if stalls_s else None,
        "lost": round(statistics.median(lost), 4),
        "lost_min": round(min(lost), 4),
        "lost_max": round(max(lost), 4),
    }
    return [
        report.row(
            bench="checkpoint",
            backend=SAVING if kind else NOT_SAVING,
            op=STEP,
            size_bytes=sum(tensor.nbytes for tensor in tensors_of(state)),
            dtype="float32",
            world_size=ringps.world_size(),
            times_s=by_kind[kind],
            facts={**facts, **(found if kind else {})},
        )
        for kind in (False, True)
    ]
