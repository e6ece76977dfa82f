"""Shared memory between real processes: what threads of one interpreter cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import run, script

MANY = """
import random
import torch
import ringps

torch.set_num_threads(1)
ringps.init()
n, rank = ringps.world_size(), ringps.rank()
same, own = random.Random(7), random.Random(rank)
pending = []
for turn in range(250):
    numel = same.choice([1, 100, 16_385, 70_000, 400_001, 1_500_000])
    waits, shared, kind = same.random() < 0.6, same.random() < 0.5, same.random()
    pattern = (torch.arange(numel) + turn) % 1021
    tensor = ringps.empty(numel, torch.float32) if shared and own.random() < 0.8 else torch.empty(numel)
    tensor.copy_(pattern + rank)
    if kind < 0.8:
        wanted = (pattern * n + sum(range(n))).float()
        handle = ringps.all_reduce(tensor, async_op=not waits)
    else:
        src = same.randrange(n)
        wanted = (pattern + src).float()
        handle = ringps.broadcast(tensor, src, async_op=not waits)
    pending.append((handle, tensor, wanted))
    if waits or len(pending) > 4:
        for handle, tensor, wanted in pending:
            if handle is not None:
                handle.wait()
            assert torch.equal(tensor, wanted), (turn, numel, int((tensor != wanted).sum()))
            tensor.fill_(-1.0)  # nobody may read it any more
        pending.clear()
for handle, tensor, wanted in pending:
    if handle is not None:
        handle.wait()
    assert torch.equal(tensor, wanted)
print("all right")
ringps.shutdown()
"""


@pytest.mark.parametrize("workers", [2, 4])
def test_hundreds_of_collectives_of_all_sizes_are_exact(tmp_path: Path, workers: int) -> None:
    done = run("run", "-n", str(workers), "--transport", "shm", script(tmp_path, MANY))
    assert done.code == 0, done
    assert done.out.count("all right") == workers


DIES = """
import os, signal, sys, time
import ringps
from ringps.collectives.shm import links

if os.environ["RINGPS_WORKER_ID"] == "1":
    def die(*_):
        print("dies", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    links.LocalListener.connect = die
try:
    ringps.init()
except ringps.PeerLostError as error:
    print("told", time.time(), error, flush=True)
    sys.exit(7)
"""


def test_a_worker_killed_while_neighbours_wait_for_it_is_named_by_all(tmp_path: Path) -> None:
    """It listened, so the ring was formed, and dies before it has met anybody on its host."""
    done = run("run", "-n", "3", "--min-workers", "3", script(tmp_path, DIES))
    assert done.code == 137
    died_s = next(float(line.split()[2]) for line in done.out.splitlines() if " dies " in line)
    told = [line for line in done.out.splitlines() if " told " in line]
    assert len(told) == 2, done
    for line in told:
        assert "rank 1 (worker 1 on" in line
        assert "SIGKILL" in line
        assert float(line.split()[2]) - died_s < 1
