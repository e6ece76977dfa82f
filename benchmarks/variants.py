"""The ways to train that are compared: alone, under PyTorch's DistributedDataParallel, under ringps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import report
import ringps
from models import Batch, Workload

DDP_VIEW = f"{report.DDP}-view"
"""DDP whose gradients are views of its buckets, which saves a copy."""
DDPS = (report.DDP, DDP_VIEW)
_COMPARED_STEPS = 3


@dataclass
class Variant:
    """A model and its optimizer, in training."""

    name: str
    parallel: nn.Module
    """What is called: the model, or what wraps it."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    """Of this rank's batches, one per step."""

    def step(self, batch: Batch) -> float:
        """Train one step; the seconds it took. Collective, unless nothing is communicated."""
        inputs, targets = batch
        start_s = time.perf_counter()
        self.optimizer.zero_grad()
        loss: Any = functional.cross_entropy(self.parallel(inputs), targets)
        loss.backward()
        self.optimizer.step()
        elapsed_s = time.perf_counter() - start_s
        self.losses.append(loss.item())
        return elapsed_s


def make(name: str, workload: Workload, model: nn.Module) -> Variant:
    """Make a model ready to be trained. Collective.

    Args:
        model: of the workload; it is trained itself, not a copy.
        name: `report.WITHOUT`, `report.DDP`, `DDP_VIEW`, or anything else for ringps.
    """
    parallel = model
    if name in DDPS:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=name == DDP_VIEW)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
    if name not in (report.WITHOUT, *DDPS):
        optimizer = ringps.DistributedOptimizer(optimizer, model)
    return Variant(name, parallel, model, optimizer)


def batches(workload: Workload, rank: int, number: int = 4) -> list[Batch]:
    """What a rank trains with, again and again."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return [workload.draw(generator) for _ in range(number)]


def check_equal(variant: Variant) -> None:
    """Compare the parameters with rank 0's, bit by bit. Collective.

    Raises:
        SystemExit: on every rank, if any rank's differ; rank 0's message counts them.
    """
    differing = torch.zeros(1, dtype=torch.int64)
    for parameter in variant.model.parameters():
        own = parameter.detach()
        leading = own.clone()
        ringps.broadcast(leading, 0)
        # As whole numbers: 0.0 equals -0.0, and a NaN does not equal itself.
        differing += (own.view(torch.int32) != leading.view(torch.int32)).sum()
    ringps.all_reduce(differing)
    if differing.item():
        raise SystemExit(f"{variant.name}: {differing.item()} parameters differ between the ranks")


def check_losses(one: Variant, other: Variant, tolerance: float = 1e-4) -> None:
    """Compare two variants' losses of the first steps on this rank.

    Later ones may differ: sums are rounded in another order, and a unit of which the input is nearly zero
    may be on in one model and off in the other. (In float64 they agree to the last digits for longer.)

    Raises:
        SystemExit: they differ by more than `tolerance`, relative to the larger (or to 1).
    """
    pairs = list(zip(one.losses, other.losses, strict=True))
    for step, (a, b) in enumerate(pairs[:_COMPARED_STEPS], start=1):
        if not abs(a - b) <= tolerance * max(1.0, abs(a), abs(b)):
            raise SystemExit(
                f"rank {ringps.rank()}, step {step}: the loss is {a} with {one.name}, "
                f"{b} with {other.name}; they may differ by {tolerance}"
            )
