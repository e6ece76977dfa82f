"""Jobs that train on a GPU lose workers, and all of them: nothing is lost, and nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import ledgers
from tests.gpu.card import PRETEND
from tests.launching import ROOT, Ringps, start

pytestmark = [pytest.mark.timeout(170), pytest.mark.usefixtures("need_gpu")]

SCRIPT = ROOT / "tests/chaos/train.py"
SAMPLES = 203
LIMIT_S = 100.0
LOOK_S = 0.01

Process = tuple[int, int]
"""Worker id, and process id."""


def train(
    directory: Path, workers: int, least: int, steps: int, *options: str, transport: str = "auto"
) -> Ringps:
    """Start a job; what its workers print goes to files, so that nobody has to read it meanwhile."""
    directory.mkdir(exist_ok=True)
    ring = ["-n", str(workers), "--min-workers", str(least), "--transport", transport]
    script = [str(SCRIPT), str(directory), "--steps", str(steps), "--samples", str(SAMPLES)]
    script += ["--workers", str(workers), "--gpu", "pretended" if PRETEND else "cuda"]
    logs = ["--log-dir", str(directory / "logs"), "--events", str(directory / "events.jsonl")]
    # Without it cuBLAS may add up in another order where several streams work.
    environ = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return start("run", *ring, *logs, *options, *script, environ=environ)


def lines_of(directory: Path) -> dict[Process, list[dict[str, Any]]]:
    """What each process has written; a line that is being written is left out."""
    found: dict[Process, list[dict[str, Any]]] = {}
    for path in directory.glob("ledger-*.jsonl"):
        _, worker_id, pid = path.stem.split("-")
        whole, _, _ = path.read_text().rpartition("\n")
        found[int(worker_id), int(pid)] = [json.loads(line) for line in whole.splitlines()]
    return found


def commits_of(directory: Path) -> dict[Process, list[int]]:
    """Steps that each process committed."""
    return {
        process: [line["step"] for line in lines if line["kind"] == "commit"]
        for process, lines in lines_of(directory).items()
    }


def wait(job: Ringps, condition: Callable[[], bool], wanted: str) -> None:
    """Look until it is true; the job must go on all the while."""
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        if job.process.poll() is not None:
            raise AssertionError(f"the job ended before there was {wanted}: {job.finish()}")
        if time.monotonic() > end_s:
            job.process.kill()
            raise AssertionError(f"{wanted}: not within {LIMIT_S:g} s: {job.finish()}")
        time.sleep(LOOK_S)


def end(job: Ringps) -> str:
    """The job ends well; what it printed."""
    out, err = job.process.communicate(timeout=LIMIT_S)
    assert job.process.returncode == 0, f"{out[-3000:]}\n{err[-5000:]}"
    return out + err


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_workers_that_are_killed_or_frozen_are_replaced(tmp_path: Path, transport: str) -> None:
    """First by SIGKILL, then by SIGSTOP; one that takes the lost one's place trains with the others."""
    steps, directory = 800 if PRETEND else 2000, tmp_path / "job"
    with train(directory, 3, 1, steps, "--max-restarts", "10", transport=transport) as job:
        known: set[Process] = set()
        for number in (signal.SIGKILL, signal.SIGSTOP):

            def three_train(known: set[Process] = known) -> bool:
                new = {process for process, done in commits_of(directory).items() if len(done) >= 5}
                return len(new - known) == (3 if not known else 1)

            wait(job, three_train, f"three that train, before {number.name}")
            members = set(lines_of(directory))
            victim = max(process for process in members if process not in known or not known)
            known |= members
            os.kill(victim[1], number)
        wait(job, lambda: len(set(lines_of(directory)) - known) == 1, "the second replacement")
        printed = end(job)
    counts = ledgers.check(directory, steps=steps, samples=SAMPLES)
    assert (counts["processes"], counts["ended"]) == (5, 3)
    logs = printed + "".join(path.read_text() for path in (directory / "logs").rglob("*") if path.is_file())
    way = "cuda_ipc (auto" if transport == "auto" else "staged (as asked"
    assert f"GPU tensors: {way}" in logs


def ending(directory: Path) -> tuple[int, str]:
    """Last step and hash of the parameters, the same of all that came to the end."""
    ends = {
        (line["step"], line["digest"])
        for lines in lines_of(directory).values()
        for line in lines
        if line["kind"] == "end"
    }
    assert len(ends) == 1, ends
    return ends.pop()


def test_a_job_of_which_all_workers_were_killed_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    steps = 400 if PRETEND else 1500
    once = ("--max-restarts", "0")
    with train(tmp_path / "whole", 2, 1, steps, *once) as job:
        end(job)
    killed = tmp_path / "killed"
    with train(killed, 2, 1, steps, *once) as job:

        def some_are_saved() -> bool:
            done = commits_of(killed).values()
            events = killed / "events.jsonl"
            saved = events.exists() and '"checkpoint_saved"' in events.read_text()
            return saved and len(done) == 2 and min(map(len, done)) >= 20

        wait(job, some_are_saved, "a checkpoint")
        first = set(lines_of(killed))
        for _, pid in first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert job.process.wait(LIMIT_S) == 128 + signal.SIGKILL
        job.finish()
    assert not any(line["kind"] == "end" for lines in lines_of(killed).values() for line in lines)
    with train(killed, 2, 1, steps, *once) as job:
        end(job)
    again = [done for process, done in commits_of(killed).items() if process not in first]
    assert [(done[0] > 1, done[-1]) for done in again] == [(True, steps)] * 2
    assert ending(killed) == ending(tmp_path / "whole")
