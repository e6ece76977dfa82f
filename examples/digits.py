"""Train a small convolutional network on scikit-learn's handwritten digits.

    python examples/digits.py                       # alone
    ringps run -n 4 examples/digits.py              # the same script, on 4 workers

What makes it data-parallel: `ringps.init()`, the sampler, the optimizer's wrapper, `ringps.shutdown()`.
What lets workers come and go meanwhile: `TrainState` and its `steps`. The result hardly depends on the number
of workers: the global batch is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ringps

TEST_SAMPLES = 360


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The digits (N, 1, 8, 8) in 0..1 and their labels (N), split at random: to train on, to test on."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Moved by up to one pixel each way, at random: a cheap way to more training data."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), dims=(2, 3))


def say(text: str) -> None:
    """Print it once, not once per worker."""
    if ringps.rank() == 0:
        print(text, flush=True)


def mark(good: bool) -> str:
    return "ok" if good else "FAILED"


def sum_over_ranks(*values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    ringps.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Fraction that the model gets right; each rank looks at its part of the dataset."""
    model.eval()
    images, labels = (tensor[ringps.rank() :: ringps.world_size()] for tensor in dataset.tensors)
    right = (model(images).argmax(dim=1) == labels).sum().item()
    model.train()
    right, seen = sum_over_ranks(right, len(images))  # if a worker is lost here, its part is left out
    return right / seen


def same_on_all_ranks(model: nn.Module) -> bool:
    """Whether the ranks' parameters are equal, bit by bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    least = torch.tensor(list(digest.digest()))
    most = least.clone()
    ringps.all_reduce(least, "min")
    ringps.all_reduce(most, "max")
    return bool((least == most).all())


def main() -> int:
    parser = argparse.ArgumentParser(description="Handwritten digits, data-parallel.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="samples per step, over all workers")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.97, help="test accuracy to reach")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a worker per core: they would only get in each other's way
    ringps.init()
    torch.manual_seed(options.seed + ringps.worker_id())  # shifts and dropout differ from worker to worker

    train, test = load(options.seed)
    model = build()  # the wrapper makes all ranks start with rank 0's parameters
    sampler = ringps.ElasticBatchSampler(len(train), global_batch_size=options.batch, seed=options.seed)
    loader = DataLoader(train, batch_sampler=sampler)
    plain = torch.optim.AdamW(model.parameters(), lr=options.lr)
    optimizer = ringps.DistributedOptimizer(plain, model, sampler=sampler)
    until = options.epochs * len(sampler)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, until)
    state = ringps.TrainState(model=model, optimizer=optimizer, sampler=sampler, scheduler=schedule)

    loss_sum, loss_count, samples = 0.0, 0, 0
    start_s = time.perf_counter()
    for step, (images, labels) in state.steps(loader, until):
        loss = functional.cross_entropy(model(shifted(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum, loss_count = loss_sum + loss.item() * len(images), loss_count + len(images)
        samples += options.batch
        if step % len(sampler) == 0:
            all_loss, all_count = sum_over_ranks(loss_sum, loss_count)
            rate = samples / (time.perf_counter() - start_s)
            epoch = step // len(sampler)
            say(f"epoch {epoch:3}/{options.epochs}  loss {all_loss / all_count:.4f}  {rate:6.0f} samples/s")
            loss_sum, loss_count = 0.0, 0

    reached = accuracy(model, test)
    same = same_on_all_ranks(model)
    good = reached >= options.target
    say(f"trained on {ringps.world_size()} workers, {rate:.0f} samples/s in sum")
    say(
        f"test accuracy {reached:.2%} on {len(test)} unseen digits, {options.target:.0%} wanted: {mark(good)}"
    )
    say(f"parameters bitwise equal on all ranks: {mark(same)}")
    ringps.shutdown()
    return 0 if good and same else 1


if __name__ == "__main__":
    sys.exit(main())
