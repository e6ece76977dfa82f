"""What does `DistributedOptimizer` add to a training step on a GPU, where there is nobody to exchange with?

    python benchmarks/gpu_step.py --json FILE                                   # a ring of one
    ringps run -n 1 --min-workers 1 benchmarks/gpu_step.py --json FILE          # that others may join

Two copies of a GPT, one with the plain optimizer, take turns from one step to the next, in bfloat16 autocast.
A step ends when the GPU has done all of it. Both must have the same
losses at first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import gpu_device
import gpu_report
import ringps
from gpu_device import Card
from gpu_report import GpuRow
from models import WORKLOADS, Workload, gpt_workload
from ringps import worker_env

_BAR = 0.99
_WARM_STEPS, _STEPS = 5, 60
_TOLERANCE = 0.02
_LARGE = gpt_workload("gpt-85m", width=768, layers=12, context=512, batch=8)
"""As large as GPT-2's smallest; the other one is so small that the host limits it."""

Step = Callable[[], float]


def step_of(
    card: Card, model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Step, list[torch.Tensor]]:
    """What trains one step and says how long it took; and the losses of the steps so far."""
    inputs, targets = batch
    losses: list[torch.Tensor] = []

    def step() -> float:
        card.synchronize()
        start_s = time.perf_counter()
        optimizer.zero_grad()
        with card.autocast():
            loss: Any = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        card.synchronize()
        elapsed_s = time.perf_counter() - start_s
        losses.append(loss.detach())
        return elapsed_s

    return step, losses


def measure(card: Card, workload: Workload, name: str) -> list[GpuRow]:
    """The plain step, and that of `DistributedOptimizer`."""
    torch.manual_seed(0)
    plain = workload.build()
    wrapped = copy.deepcopy(plain)
    inputs, targets = workload.draw(torch.Generator().manual_seed(0))
    batch = card.inputs(inputs), card.inputs(targets)
    steps, losses = [], []
    for model in (plain, wrapped):
        card.adopt(model)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if model is wrapped:
            optimizer = ringps.DistributedOptimizer(optimizer, model)
        step, own = step_of(card, model, optimizer, batch)
        steps.append(step)
        losses.append(own)
    for _ in range(_WARM_STEPS):
        for step in steps:
            step()
    times_s: list[list[float]] = [[], []]
    for number in range(card.repeats(_STEPS)):
        for place in (number % 2, 1 - number % 2):
            times_s[place].append(steps[place]())
    # Later ones may differ: a sum on a GPU may be rounded differently each time.
    without, within = (torch.stack(some[:_WARM_STEPS]).float().cpu() for some in losses)
    if not torch.allclose(without, within, rtol=_TOLERANCE):
        raise SystemExit(
            f"{workload.name}: the losses are {without.tolist()}, and {within.tolist()} with ringps"
        )
    plain_s = statistics.median(times_s[0])
    size_bytes = sum(one.nbytes for one in plain.parameters())
    return [
        gpu_report.measured(
            f"train step, {workload.name}",
            backend=backend,
            size_bytes=size_bytes,
            dtype="bfloat16",
            times_s=own_s,
            rehearsal=card.rehearsal,
            ceiling_s=plain_s if backend == name else None,
            bar=_BAR if backend == "ring of one" else None,
            facts={"model": workload.name},
        )
        for backend, own_s in zip(("plain PyTorch", name), times_s, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps in a ring of one, and without ringps.")
    gpu_device.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ringps.init()
    card = gpu_device.card(options.rehearse)
    name = "ring of one" if worker_env.read() is None else "elastic ring of one"
    rows = []
    for workload in (WORKLOADS["gpt-tiny"],) if card.rehearsal else (WORKLOADS["gpt"], _LARGE):
        rows += measure(card, workload, name)
        gpu_report.write(options.json, rows)
    ringps.shutdown()


if __name__ == "__main__":
    main()
