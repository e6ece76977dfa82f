"""A worker that runs one case after the other, and writes down what came of each."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import ringps
from ringps.worker_env import configure
from tests.gpu.card import COUNT, PRETEND, Card

Case = Callable[[Card], None]


class CannotBePretended(Exception):
    """It needs a real GPU; raised before anything collective."""


def needs_a_gpu() -> None:
    """Raise that if there is none."""
    if PRETEND:
        raise CannotBePretended


def main(cases: Mapping[str, Case]) -> None:
    """Run all; after one that fails the ranks are not together any more, and nothing else is run."""
    torch.set_num_threads(1)
    ringps.init()
    # NCCL wants a GPU for each; the others share the first, so that one is enough.
    index = ringps.local_rank() % COUNT if configure().transport == "nccl" else 0
    card = Card(index)
    with (Path(sys.argv[1]) / f"rank-{ringps.rank()}.jsonl").open("w", buffering=1) as file:
        for name, case in cases.items():
            try:
                case(card)
            except CannotBePretended:
                print(json.dumps([name, "cannot be pretended"]), file=file)
                continue
            except BaseException:
                print(json.dumps([name, traceback.format_exc()]), file=file)
                raise
            print(json.dumps([name, "passed"]), file=file)
    ringps.shutdown()
