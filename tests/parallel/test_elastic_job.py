"""Training jobs under `ringps run` that lose workers and get new ones: no step and no sample is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringps.membership import JobKey
from tests.elastic_job import BATCH, SAMPLES, TRAIN, Ledgers
from tests.launching import ROOT, Finished, Ringps, run, script, start
from tests.support import free_pair

pytestmark = pytest.mark.timeout(120)  # jobs of several processes that load torch, on busy cores

QUICK = {"RINGPS_HEARTBEAT_TIMEOUT_S": "1.5", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1"}


class Site:
    """Where a job's files are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program = script(directory, TRAIN)
        self.events = directory / "events.jsonl"

    def arguments(self, *options: str) -> tuple[str | Path, ...]:
        return (self.program, str(self.directory), *options)

    @contextlib.contextmanager
    def job(self, *run_options: str, train: tuple[str, ...] = (), **environ: str) -> Iterator[Ringps]:
        with start(
            "run",
            *run_options,
            "--events",
            self.events,
            *self.arguments(*train),
            environ={**QUICK, **environ},
        ) as command:
            yield command

    def go(self) -> None:
        (self.directory / "GO").touch()

    def end(self, *commands: Ringps) -> list[Finished]:
        """Let the job end, which it must do well."""
        self.go()
        done = [command.finish() for command in commands]
        assert [finished.code for finished in done] == [0] * len(done), done
        return done

    def happened(self, *names: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [event for event in events if event["event"] in names]

    def sizes(self) -> list[int]:
        """Of all generations."""
        return [len(event["members"]) for event in self.happened("generation")]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def pid_of(line: str) -> int:
    found = re.search(r"pid (\d+) ", line)
    assert found is not None, line
    return int(found[1])


def await_ranks(command: Ringps, size: int, step: int = 1) -> dict[int, int]:
    """Read until every rank has said that it is one of `size`, at `step` or later; their process ids.

    They say so whenever it changes, and at every 20th step.
    """
    pids: dict[int, int] = {}
    while len(pids) < size:
        line = command.expect(f" of {size} at step ")
        if int(line.split()[7]) >= step:
            pids[int(line.split()[9])] = pid_of(line)
    return pids


@pytest.mark.parametrize(
    ("number", "options", "reason"),
    [
        (signal.SIGKILL, ("--transport", "tcp"), r"process killed by signal 9 \(SIGKILL\)"),
        (signal.SIGSTOP, (), r"process killed by signal 9 \(SIGKILL\) by its launcher: .*no heartbeat.*"),
        (signal.SIGTERM, ("--encrypt-data", "--transport", "zmq"), r"asked to leave \(SIGTERM\)"),
    ],
)
def test_no_step_is_lost_with_a_worker_and_another_takes_its_place(
    site: Site, number: signal.Signals, options: tuple[str, ...], reason: str
) -> None:
    with site.job("-n", "3", *options) as command:
        pids = await_ranks(command, 3, step=20)
        os.kill(pids[1], number)
        await_ranks(command, 2)
        later = await_ranks(command, 3)
        await_ranks(command, 3)  # some steps later
        [done] = site.end(command)
    assert set(later.values()) > {pids[0], pids[2]}
    assert site.sizes() == [3, 2, 3]
    assert re.fullmatch(
        rf"ringps: done; 1 worker was lost on the way \(worker 1: {reason}\) and 1 replaced", done.last
    ), done.last
    ledgers = Ledgers(site.directory)
    commits = ledgers.check()
    assert len(ledgers.of("end")) == 4  # processes
    check_batches(ledgers, commits, losses=0 if number == signal.SIGTERM else 1)


def test_a_script_that_hangs_is_what_is_lost_and_not_those_that_wait_for_it(site: Site) -> None:
    with site.job("-n", "3", train=("--hangs-at", "30"), RINGPS_OP_TIMEOUT_S="2") as command:
        await_ranks(command, 3, step=20)
        await_ranks(command, 2)
        await_ranks(command, 3)
        [done] = site.end(command)
    assert re.search(r"1 worker was lost on the way \(worker 1: .*\) and 1 replaced", done.last), done.last
    [lost] = site.happened("worker_lost")
    assert "has not come to the new generation for 2 s (op_timeout_s)" in lost["reason"]
    assert site.sizes() == [3, 2, 3]
    Ledgers(site.directory).check()


def test_a_ring_shrinks_to_one_and_grows_again_with_all_that_makes_up_the_state(site: Site) -> None:
    """Scheduler, gradient scaler, dropout, and a loader with processes that read ahead."""
    with site.job("-n", "3", train=("--scaled", "--loaders", "2"), TMPDIR=str(site.directory)) as command:
        # TMPDIR: a killed process leaves the socket there by which its loader's processes send memory.
        pids = await_ranks(command, 3, step=20)
        os.kill(pids[2], signal.SIGKILL)
        os.kill(pids[0], signal.SIGKILL)
        await_ranks(command, 1)
        later = await_ranks(command, 3)
        await_ranks(command, 3)  # some steps later
        [done] = site.end(command)
    assert pids[1] in later.values()
    assert site.sizes()[-1] == 3
    assert min(site.sizes()) == 1
    assert "2 workers were lost on the way" in done.last
    assert done.last.endswith("and 2 replaced")
    ledgers = Ledgers(site.directory)
    commits = ledgers.check()
    end = next(line for lines in ledgers.of("end").values() for line in lines)
    assert end["scale"] > 64
    assert end["lr"] == pytest.approx([0.01 * 0.9 ** (end["step"] // 50)])
    check_batches(ledgers, commits, losses=2)


def check_batches(ledgers: Ledgers, commits: dict[int, dict[str, Any]], losses: int) -> None:
    """The global batch is constant, but for a step in which a worker is lost, the one after it, in which its
    samples are still its own, and those that make up for them at an epoch's end."""
    sizes = ledgers.batch_sizes(commits)
    small = [step for step, size in sizes.items() if size not in (BATCH, SAMPLES % BATCH)]
    assert len(small) <= 3 * losses, (small, sizes)
    assert all(size <= BATCH for size in sizes.values())


def check_turned_away(process: subprocess.Popen[str], *words: str) -> None:
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 1, out
    assert all(word in out for word in words), out


def test_a_worker_that_does_not_fit_is_turned_away_and_the_ring_trains_on(site: Site) -> None:
    """Started by hand in the place of one that is not replaced. In the end, too few workers are left."""
    with site.job("-n", "3", "--min-workers", "2", "--max-restarts", "0") as command:
        pids = await_ranks(command, 3, step=20)
        os.kill(pids[2], signal.SIGKILL)
        await_ranks(command, 2)
        ledgers = Ledgers(site.directory)
        [contract] = ledgers.of("environ")[2, pids[2]]

        def joiner(*options: str, program: Path = site.program, **environ: str) -> subprocess.Popen[str]:
            variables = {**os.environ, "RANK": "2", "PYTHONPATH": str(ROOT), **contract["environ"], **environ}
            return subprocess.Popen(
                [sys.executable, str(program), str(site.directory), *options],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        key = site.directory / "other.key"
        JobKey.generate().save(key)
        other = script(site.directory, TRAIN + "# another one", "other.py")
        for process, *words in (
            (joiner(program=other), "RefusedError", "this worker runs another script"),
            (joiner(RINGPS_KEY_FILE=str(key)), "AuthenticationError"),
        ):
            check_turned_away(process, *words)
        for options, *words in (
            (("--width", "16"), "LayoutMismatchError", '"0.weight"', "float32[24, 8]", "float32[16, 8]"),
            (("--optimizer", "Adam"), "LayoutMismatchError", '"optimizer"', "has AdamW, this worker Adam"),
        ):
            check_turned_away(joiner(*options), *words)
        before = len(Ledgers(site.directory).of("commit")[0, pids[0]])
        os.kill(pids[0], signal.SIGKILL)
        done = command.finish()
    assert done.code == 128 + signal.SIGKILL
    assert re.match(
        r"ringps: rank 0 \(worker 0 on .*\) failed: process killed by signal 9 \(SIGKILL\)", done.last
    )
    assert "PeerLostError: rank 0 (worker 0 on" in done.err
    commits = Ledgers(site.directory).check(ended=False)
    assert len(commits) >= before
    assert set(site.sizes()) == {3, 2}


def test_more_least_workers_than_workers_are_refused(site: Site) -> None:
    done = run("run", "-n", "2", "--min-workers", "3", site.program)
    assert done.code == 2
    assert "--min-workers" in done.last


def test_two_machines_outlive_their_coordinator_and_a_worker(site: Site) -> None:
    """Machines are names here: shared memory on each, TCP between them."""
    key, address = site.directory / "job.key", f"127.0.0.1:{free_pair()}"

    def coordinator() -> Ringps:
        return start(
            "coordinator",
            "--bind",
            address,
            "--key-file",
            key,
            "-n",
            "4",
            "--events",
            site.events,
            environ=QUICK,
        )

    def machine(name: str) -> Ringps:
        where = ("--join", address, "--key-file", str(key), "--host", name, "--address", "127.0.0.1")
        return start("run", "-n", "2", *where, *site.arguments(), environ=QUICK)

    with coordinator() as first:
        first.expect("listens on")
        with machine("a") as a, machine("b") as b:
            a.expect(" of 4 at step ")
            victim = pid_of(b.expect(" of 4 at step "))
            first.send(signal.SIGKILL)
            first.finish()
            os.kill(victim, signal.SIGKILL)
            with coordinator() as second:
                a.expect(" of 3 at step ")
                a.expect(" of 4 at step ")
                b.expect(" of 4 at step ")
                done = site.end(second, a, b)
    assert done[2].last.endswith("(SIGKILL)) and 1 replaced"), done[2].last
    assert "transport hierarchical" in done[1].err + done[2].err
    ledgers = Ledgers(site.directory)
    commits = ledgers.check()
    assert {len(commit["voters"]) for commit in commits.values()} == {3, 4}
