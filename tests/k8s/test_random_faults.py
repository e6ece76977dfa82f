"""Thirty faults at random on one job of pods, and nothing is lost."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.controlplane import ControlPlane
from tests.k8s.faults import GPUS, Campaign, draw
from tests.k8s.job import Job, Pods
from tests.k8s.kubelet import Fleet
from tests.k8s.test_training import gpu_pod, priority_class

SEED = "RINGPS_TEST_SEED"
_ALL = (0, 1, 2, 3)
_MEMBERS_S = 150.0


@pytest.fixture
def pods(control_plane: ControlPlane, namespace: str, nodes: Fleet, tmp_path: Path) -> Iterator[Pods]:
    """Three nodes with GPUs for workers, and one without."""
    for index in range(3):
        nodes.add(f"node-{index}", cpu="4", memory="16Gi", gpus=GPUS)
    nodes.add("node-without", cpu="4", memory="16Gi")
    made = Pods(control_plane, namespace, nodes, tmp_path)
    made.let_coordinators_see_nodes()
    for name, value in (("low", 10), ("high", 1000)):
        priority_class(made, f"{namespace}-{name}", value)
    yield made
    for name in ("low", "high"):
        made.api.delete("PriorityClass", f"{namespace}-{name}")
    made.close()


@pytest.mark.timeout(600)
def test_nothing_is_lost_by_thirty_faults(pods: Pods) -> None:
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    print(f"\n{SEED}={seed}")
    job = pods.train(
        "shaken", 4, "--gpus", "1", "--min-workers", "1", "--max-restarts", "100", "--dead-node-s", "4",
        "--checkpoint-budget", "5", "--priority-class", f"{pods.namespace}-low", script=("--step-s", "0.1"),
    )  # fmt: skip
    campaign = Campaign(pods, job, lambda name, node, gpus: gpu_pod(pods, name, gpus, "high", node) and None)
    plan = draw(seed)
    assert len(plan) == 30
    try:
        campaign.until(lambda: campaign.trail.last_step >= 20, "20 steps")
        campaign.run(plan)
        campaign.mend()
        campaign.until(lambda: _trainers(campaign) == _ALL, "all four train", _MEMBERS_S)
        _check(pods, job, campaign)
    except Exception as error:
        pods.plane.mend()
        history = "\n".join(campaign.history)
        raise AssertionError(f"{SEED}={seed}: {error}\n{history}\n{job.describe()}") from error


def _trainers(campaign: Campaign) -> tuple[int, ...]:
    return tuple(sorted(worker_id for worker_id, *_ in campaign.trail.members))


def _check(pods: Pods, job: Job, campaign: Campaign) -> None:
    shown = pods.ringps("status", job.name).stdout
    job.finish()
    campaign.note(f"the job is complete; world sizes {job.ledger.worlds()}")
    assert job.ledger.rollbacks == 0
    status = job.status()
    print(shown, status["restarts"], status["budget"])
    assert status["phase"] == "done"
    restarts, done = status["restarts"], campaign.done
    for cause in ("killed", "evicted", "drained", "node lost", "preempted", "suspended"):
        assert restarts[cause] > 0, (cause, restarts)
        assert cause in shown, (cause, shown)
    assert status["budget"]["used"] >= done["kill pod"] + done["kill process"], (status["budget"], done)
