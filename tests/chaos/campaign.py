"""A chaos campaign: one job, a random plan of many faults, and what must be true afterwards."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ringps.checkpoint.inspection import verify
from ringps.testing.job import Ended, FaultyJob, run_job
from ringps.testing.nursery import Nursery
from ringps.testing.plan import TRAINING, Fault, FaultPlan, Kind, Moment
from tests.chaos import ledgers

SCRIPT = Path(__file__).with_name("train.py")
SAMPLES = 203
ENVIRON = {
    "RINGPS_CHECK_PARAMETERS_EVERY": "1",
    "RINGPS_SILENT_LINK_S": "1",
    "RINGPS_RENDEZVOUS_TIMEOUT_S": "60",
}
SAVING = ("save_write", "save_publish") * 2
"""Moments of a save, drawn twice as often as any other."""
MANY: dict[Kind, int] = {
    "kill": 2, "leave": 1, "stop": 4, "cut": 5, "delay": 5, "slow": 3,
    "corrupt_bucket": 5, "corrupt_parameters": 3, "corrupt_frame": 4,
}  # fmt: skip
"""Mostly faults that need no new process."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A job and the faults that happen to it."""

    seed: int
    count: int
    transport: str
    """`tcp`, `shm`, or `both`: shared memory between two and two workers, TCP between these pairs."""
    kinds: dict[Kind, int] = field(default_factory=lambda: dict(MANY))
    workers: int = 4
    gpu: bool = False
    """Train on a pretended GPU that all workers share: by CUDA IPC instead of shared memory, staged over
    TCP."""
    steps_per_fault: int = 5

    @property
    def steps(self) -> int:
        """Steps of the whole job."""
        return self.count * self.steps_per_fault + 60 * self.workers

    @property
    def _asked(self) -> str:
        if self.transport == "both":
            return "auto"
        return "cuda_ipc" if self.gpu and self.transport == "shm" else self.transport

    def plan(self) -> FaultPlan:
        """At the end one worker after the other dies, so that no fault waits in vain for a new generation."""
        foreign = {"tcp": "phase", "shm": "chunk", "both": None}[self.transport]
        over_tcp = self.transport != "shm"
        kinds = {kind: weight for kind, weight in self.kinds.items() if over_tcp or kind != "corrupt_frame"}
        due = self.steps_per_fault * self.count
        drawn = FaultPlan.random(
            random.Random(self.seed).randrange,
            workers=self.workers,
            steps=due,
            count=self.count - self.workers,
            kinds=kinds,
            points=[point for point in (*TRAINING, *SAVING) if point != foreign],
            buckets=3,
        )
        last = (
            Fault(
                kind="kill",
                worker_id=worker_id,
                at=Moment(point="vote", since_step=due + 40 * worker_id),
                least_members=3,
            )
            for worker_id in range(self.workers)
        )
        return FaultPlan((*drawn.faults, *last))

    def run(self, nursery: Nursery, directory: Path) -> str:
        """Run it, and check everything. Returns a line on how it went.

        Raises:
            AssertionError: a fault did not happen, or the job did not go as it must.
        """
        plan = self.plan()
        job = FaultyJob(
            script=SCRIPT,
            workers=self.workers,
            plan=plan,
            directory=directory,
            arguments=(
                *(str(directory), "--steps", str(self.steps), "--samples", str(SAMPLES)),
                *(["--gpu"] if self.gpu else []),
            ),
            environ={**ENVIRON, "RINGPS_TRANSPORT": self._asked},
            hosts=2 if self.transport == "both" else 1,
        )
        ended = run_job(job, nursery)
        assert ended.failure is None, f"the job failed: {ended.failure}"
        plan.check_fired(job.record.read_text())
        counts = ledgers.check(directory, steps=self.steps, samples=SAMPLES)
        check_exits(ended, directory)
        saved = check_checkpoints(ended, directory, self.steps)
        happened = Counter(fault.kind for fault in plan.faults)
        kinds = ", ".join(f"{count} {kind}" for kind, count in happened.most_common())
        where = f"{self.transport}, on GPUs" if self.gpu else self.transport
        return (
            f"{where}, seed {self.seed}: {len(plan.faults)} faults ({kinds}) "
            f"in {ended.seconds:.0f} s, "
            f"{counts['generations']} generations, {counts['processes']} processes, "
            f"{counts['epochs']} epochs, {saved} checkpoints"
        )


def check_exits(ended: Ended, directory: Path) -> None:
    """Nobody ended for another reason than a fault: killed, asked to leave, or expelled because of a link."""
    codes = Counter(code for _, code in ended.exits)
    expelled = sum("ExpelledError" in path.read_text() for path in directory.glob("log-*"))
    strange = {code: count for code, count in codes.items() if code not in (0, 1, -9, -15, 143)}
    assert not strange and codes[1] <= expelled, f"exit codes of workers: {codes}, {expelled} were expelled"


def check_checkpoints(ended: Ended, directory: Path, steps: int) -> int:
    """Checkpoints were saved all the while, the last step is, and those that are left are whole. How many."""
    saved = [event["step"] for event in ended.events if event["event"] == "checkpoint_saved"]
    assert saved == sorted(set(saved)), f"checkpoints out of order: {saved}"
    assert saved[-1] == steps, f"the last of {steps} steps was not saved: {saved[-5:]}"
    found = verify(directory / "checkpoints").checkpoints
    damaged = [one for one in found if one.damage]
    assert found and not damaged, f"damaged checkpoints: {damaged}"
    failed = [event for event in ended.events if event["event"] == "checkpoint_failed"]
    assert not failed, f"saves that failed: {failed}"
    return len(saved)
