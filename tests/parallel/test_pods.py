"""`ringps run --pod`: launchers that come with their worker's id, against a coordinator that expects pods.

No cluster here: the test itself is what a cluster does to pods, and what an operator tells a coordinator.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringps.membership import (
    Charged,
    Coordinator,
    CoordinatorSettings,
    Fenced,
    JobKey,
    Placed,
    Recorded,
    Vanished,
    Warned,
)
from tests.elastic_job import TRAIN, Ledgers
from tests.launching import Ringps, script, start
from tests.support import free_pair

pytestmark = pytest.mark.timeout(120)

SAVES = """
import argparse, json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import ringps
from ringps.kernels.digest import digest

directory, until = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
ringps.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 1))
inputs = torch.randn(203, 8)
sampler = ringps.ElasticBatchSampler(203, 16, seed=1)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_sampler=sampler)
opt = ringps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sampler=sampler)
state = ringps.TrainState(model=model, optimizer=opt, sampler=sampler)
with ringps.Checkpointer(f"{directory}/ckpt", state) as ckpt:
    print("pid", os.getpid(), flush=True)
    if ckpt.restored_step:
        print("goes on after", ckpt.restored_step, flush=True)
    for step, (batch, targets) in ckpt.steps(loader, until=until):
        time.sleep(0.01)
        opt.zero_grad()
        (model(batch) - targets).square().mean().backward()
        opt.step()
        if step == 1:
            print("trains", ringps.world_size(), flush=True)
print("end", step, ringps.world_size(), digest(*model.parameters()).hex(), flush=True)
ringps.shutdown()
"""


class Cluster:
    """A coordinator, and pods that come and go. A pod's name is new each time."""

    def __init__(
        self, directory: Path, workers: int, *, least: int = 1, settle_s: float = 60.0, restarts: int = 3
    ) -> None:
        self.key_file = directory / "job.key"
        self.key = JobKey.generate()
        self.key.save(self.key_file)
        self._settings = {
            "world_size": workers,
            "min_workers": least,
            "settle_s": settle_s,
            "max_restarts": restarts,
            "pods": True,
        }
        self.events: list[dict[str, Any]] = []
        self.verdicts: list[str] = []
        self.records = True
        self.coordinator: Coordinator | None = None
        self.port = free_pair()
        self.pods = 0

    def rule(self, **settings: Any) -> None:
        """Start a coordinator, where the one before it was."""
        chosen: dict[str, Any] = {**self._settings, "port": self.port, **settings}
        coordinator = Coordinator(
            CoordinatorSettings(**chosen), self.key, self.events.append, self._on_verdict
        )
        self.coordinator = coordinator
        coordinator.start()

    def _on_verdict(self, verdict: str) -> None:
        self.verdicts.append(verdict)
        if self.records:
            self.tell(Recorded())

    def tell(self, event: Any) -> None:
        assert self.coordinator is not None
        self.coordinator.tell(event)

    def close(self) -> None:
        if self.coordinator is not None:
            self.coordinator.close()

    @contextlib.contextmanager
    def pod(self, worker_id: int, *command: str | Path, name: str = "") -> Iterator[Ringps]:
        """A pod, until the end of the block."""
        self.pods += 1
        name = name or f"pod-{worker_id}-{self.pods}"
        with start(
            "run", "-n", "1", "--pod", "--worker-id", str(worker_id), "--join", f"127.0.0.1:{self.port}",
            "--key-file", self.key_file, "--address", "127.0.0.1", "--host", name, "--grace", "20", *command,
            environ={"RINGPS_HEARTBEAT_TIMEOUT_S": "1.5"},
        ) as running:  # fmt: skip
            yield running

    def count(self, event: str) -> int:
        return sum(one["event"] == event for one in self.events)

    def members(self) -> list[int]:
        """Worker ids of the last generation, in ring order."""
        last = [one for one in self.events if one["event"] == "generation"][-1]
        return [member["worker_id"] for member in last["members"]]

    def until(self, found: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + 45
        while not found():
            assert time.monotonic() < end_s, (what, self.events[-10:])
            time.sleep(0.02)

    def until_members(self, *worker_ids: int) -> None:
        self.until(
            lambda: self.count("generation") > 0 and sorted(self.members()) == sorted(worker_ids),
            f"members {worker_ids}",
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(workers: int, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path, workers, **settings))
        made[-1].rule()
        return made[-1]

    yield make
    for one in made:
        one.close()


def kill(pod: Ringps) -> None:
    """As a node that loses power: nobody says anything any more."""
    pod.send(signal.SIGKILL)
    pod.process.wait()


def test_pods_train_and_end_together(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path, "--until", "30")) for i in (2, 0, 1)]
        assert [pod.finish().code for pod in pods] == [0, 0, 0]
    assert job.verdicts == ["done"]
    Ledgers(tmp_path).check()


def test_a_pod_that_dies_is_replaced_by_another_of_its_index(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        for pod in pods:
            pod.expect("at step 20")
        kill(pods[1])
        job.until_members(0, 2)
        again = stack.enter_context(job.pod(1, program, tmp_path))
        job.until_members(0, 1, 2)
        again.expect("of 3 at step")
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in (pods[0], pods[2], again)] == [0, 0, 0]
    Ledgers(tmp_path).check()
    assert job.count("ring_restarting") == job.count("restart_charged") == 0


def test_another_pod_waits_while_a_frozen_one_still_counts(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        frozen = int(pods[1].expect("pid").split()[2])
        pods[0].expect("at step 20")
        again = stack.enter_context(job.pod(1, program, tmp_path))
        os.kill(frozen, signal.SIGSTOP)
        pods[1].send(signal.SIGSTOP)
        again.expect("of 3 at step")
        pods[1].send(signal.SIGCONT)  # it finds that its place is taken, and waits for it to become free
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGCONT)
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in (pods[0], pods[2], again, pods[1])] == [0, 0, 0, 0]
    Ledgers(tmp_path).check()


def test_one_that_is_asked_leaves_in_order(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        for pod in pods:
            pod.expect("at step 20")
        pods[1].send(signal.SIGTERM)
        assert pods[1].finish().code == 143
        pods[0].expect("of 2 at step")
        assert job.count("worker_left") == 1
        job.tell(Warned(pods=((2, "pod-2-3"),), reason="preempted by the scheduler"))
        left = pods[2].finish()
        assert (left.code, "asked to leave: preempted by the scheduler" in left.err) == (143, True)
        again = [stack.enter_context(job.pod(i, program, tmp_path)) for i in (1, 2)]
        job.until_members(0, 1, 2)
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in (pods[0], *again)] == [0, 0, 0]
    Ledgers(tmp_path).check()
    assert job.count("worker_lost") == 0


def test_all_stop_at_one_checkpoint_and_go_on_with_the_same_bits(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    program = script(tmp_path, SAVES)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for directory in (whole, parted):
        directory.mkdir()
    ends = []
    for directory, interrupted in ((whole, False), (parted, True)):
        job = Cluster(directory, 3)
        job.rule()
        with contextlib.ExitStack() as stack:
            stack.callback(job.close)
            pods = [stack.enter_context(job.pod(i, program, directory, "120")) for i in range(3)]
            pods[0].expect("trains 3")
            if interrupted:
                for pod in pods:
                    pod.send(signal.SIGTERM)
                assert [pod.finish().code for pod in pods] == [75, 75, 75]
                pods = [stack.enter_context(job.pod(i, program, directory, "120")) for i in (1, 2, 0)]
                assert int(pods[0].expect("goes on after").split()[-1]) > 0
            ends.append({pod.expect("end").partition("end ")[2] for pod in pods})
            assert [pod.finish().code for pod in pods] == [0, 0, 0]
        assert job.verdicts == ["done"]
    assert len(ends[0]) == 1
    assert ends[0] == ends[1]


def test_those_that_may_stay_wait_for_the_others(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """One of three must go, and the ring needs all: it stops at a checkpoint, and two pods stay."""
    job, program = cluster(3, least=3), script(tmp_path, SAVES)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path, "150")) for i in range(3)]
        pods[0].expect("trains 3")
        pods[1].send(signal.SIGTERM)
        assert pods[1].finish().code == 75
        again = stack.enter_context(job.pod(1, program, tmp_path, "150"))
        for pod in (pods[0], pods[2], again):
            assert int(pod.expect("goes on after").split()[-1]) > 0
        assert len({pod.expect("end") for pod in (again,)}) == 1
        assert [pod.finish().code for pod in (pods[0], pods[2], again)] == [0, 0, 0]
    assert job.count("worker_lost") == 0


def test_too_few_left_in_an_elastic_ring_stop_at_a_checkpoint(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(3, least=2), script(tmp_path, SAVES)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path, "200")) for i in range(3)]
        pods[0].expect("trains 3")
        for pod in pods[:2]:
            pod.send(signal.SIGTERM)
        assert [pod.finish().code for pod in pods[:2]] == [75, 75]
        again = [stack.enter_context(job.pod(i, program, tmp_path, "200")) for i in range(2)]
        assert [pod.finish().code for pod in (*again, pods[2])] == [0, 0, 0]
    assert job.count("worker_left") == job.count("worker_lost") == 0


def test_a_coordinator_that_follows_on_another_goes_on(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        for pod in pods:
            pod.expect("at step 20")
        job.close()
        kill(pods[2])
        job.rule()
        job.until_members(0, 1)
        again = stack.enter_context(job.pod(2, program, tmp_path))
        job.until_members(0, 1, 2)
        job.close()
        (tmp_path / "GO").touch()
        for pod in (pods[0], again):
            pod.expect("end of")
        job.rule()  # their scripts are done, and nobody was there to say so
        assert [pod.finish().code for pod in (pods[0], pods[1], again)] == [0, 0, 0]
    Ledgers(tmp_path).check()
    assert job.verdicts == ["done"]


def test_nobody_hears_of_the_end_before_it_is_written_down(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(2), script(tmp_path, TRAIN)
    job.records = False
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path, "--until", "5")) for i in range(2)]
        job.until(lambda: bool(job.verdicts), "a verdict")
        assert [pod.process.poll() for pod in pods] == [None, None]
        late = stack.enter_context(job.pod(1, program, tmp_path, "--until", "5"))
        kill(pods[1])
        job.tell(Recorded())
        assert [pods[0].finish().code, late.finish().code] == [0, 0]
    Ledgers(tmp_path).check()


def test_a_pod_that_vanished_after_its_script_was_done_holds_up_nobody(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = (
        cluster(2),
        script(tmp_path, TRAIN + "\nif os.environ['RINGPS_WORKER_ID'] == '1':\n    time.sleep(99)\n"),
    )
    with contextlib.ExitStack() as stack:
        pods = [
            stack.enter_context(job.pod(i, program, tmp_path, "--until", "5", name=f"pod-{i}"))
            for i in range(2)
        ]
        pods[1].expect("end of")
        kill(pods[1])
        job.tell(Vanished(host="pod-1", reason="its node is gone"))
        assert pods[0].finish().code == 0
    Ledgers(tmp_path).check()


def test_a_script_that_always_fails_ends_the_job_once_the_budget_is_used_up(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(2, restarts=2), script(tmp_path, "sys.exit(3)")
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program)) for i in range(2)]
        done = [pod.finish() for pod in pods]
    assert [one.code for one in done] == [70, 70]
    assert job.verdicts[0].startswith("failed: ")
    assert all("the restarts are used up (--max-restarts 2)" in one.last for one in done), done
    assert job.count("restart_charged") == 3


def test_pods_that_fail_are_not_replaced_for_ever(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    job, program = cluster(3, restarts=1), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        for pod in pods:
            pod.expect("at step 20")
        for used in (1, 2):
            kill(pods[1])
            job.tell(Charged(worker_id=1, reason="out of memory"))
            job.until_members(0, 2)
            job.until(lambda used=used: job.count("restart_charged") == used, "the charge")  # type: ignore[misc]
            pods[1] = stack.enter_context(job.pod(1, program, tmp_path))
            if used == 1:
                job.until_members(0, 1, 2)
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in pods] == [0, 0, 0]  # the last pod of worker 1 only waited
    assert sorted(job.members()) == [0, 2]
    Ledgers(tmp_path).check()


def test_the_ring_starts_with_those_that_have_room(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    job, program = cluster(3, least=2, settle_s=1.0), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in (0, 2)]
        pods[0].expect("of 2 at step 20")
        pods.append(stack.enter_context(job.pod(1, program, tmp_path)))
        job.until_members(0, 1, 2)
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in pods] == [0, 0, 0]
    Ledgers(tmp_path).check()


def test_the_ring_crosses_each_boundary_once_each_way(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    job, program = cluster(4), script(tmp_path, TRAIN)
    for index, zone in enumerate(("b", "a", "b", "a")):
        job.tell(Placed(host=f"pod-{index}", place=(zone, "r1", f"node-{index}")))
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path, name=f"pod-{i}")) for i in range(4)]
        pods[0].expect("at step 20")
        assert job.members() == [1, 3, 0, 2]
        kill(pods[3])
        job.until_members(0, 1, 2)
        job.tell(Placed(host="pod-3b", place=("b", "r1", "node-9")))
        pods[3] = stack.enter_context(job.pod(3, program, tmp_path, name="pod-3b"))
        job.until_members(0, 1, 2, 3)
        assert job.members() == [1, 0, 2, 3]
        (tmp_path / "GO").touch()
        assert [pod.finish().code for pod in pods] == [0, 0, 0, 0]
    Ledgers(tmp_path).check()


def test_without_the_lease_a_minority_waits(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """Another coordinator may be in touch with the others."""
    job, program = cluster(3), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(job.pod(i, program, tmp_path)) for i in range(3)]
        for pod in pods:
            pod.expect("at step 20")
        job.tell(Fenced(held=False))
        kill(pods[1])
        job.until_members(0, 2)  # a majority of three
        pods[0].expect("of 2 at step")
        kill(pods[2])
        time.sleep(3)  # twice as long as a loss takes to be noticed
        assert sorted(job.members()) == [0, 2]
        job.tell(Fenced(held=True))
        job.until_members(0)
        pods[0].expect("of 1 at step")
        (tmp_path / "GO").touch()
        assert pods[0].finish().code == 0
    Ledgers(tmp_path).check()


def test_what_the_command_wants(tmp_path: Path) -> None:
    program = script(tmp_path, "")
    with start("run", "-n", "1", "--pod", program) as alone:
        done = alone.finish()
    assert (done.code, done.last) == (
        2,
        "ringps: --pod, --worker-id and --join go together; see `ringps run --help`",
    )


def test_events_name_pods_and_causes(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    job, program = cluster(2), script(tmp_path, TRAIN)
    with contextlib.ExitStack() as stack:
        pods = [
            stack.enter_context(job.pod(i, program, tmp_path, "--until", "40", name=f"pod-{i}"))
            for i in range(2)
        ]
        assert [pod.finish().code for pod in pods] == [0, 0]
    [training] = [one for one in job.events if one["event"] == "training"]
    assert (training["global_batch"], training["until"]) == (16, 40)
    [formed] = [one for one in job.events if one["event"] == "generation"]
    assert [member["host"] for member in formed["members"]] == ["pod-0", "pod-1"]
    json.dumps(job.events)
