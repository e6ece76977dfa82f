"""Training on a pretended GPU that several processes share, under random faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringps.testing.nursery import Nursery
from tests.chaos.campaign import Campaign

pytestmark = pytest.mark.timeout(170)  # a campaign on busy cores


@pytest.mark.parametrize("transport", ["shm", "tcp", "both"])
def test_random_faults(tmp_path: Path, transport: str) -> None:
    """By CUDA IPC, staged over TCP, and staged through shared memory and TCP."""
    with Nursery() as nursery:
        Campaign(seed=77, count=24, transport=transport, gpu=True).run(nursery, tmp_path)
