"""Members of an elastic ring that are lost under `ringps run`, and replaced. No torch, no data."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Ringps, script, start
from tests.support import free_pair

MEMBER = """
from ringps import worker_env
from ringps.errors import RingChangedError
from ringps.membership import WorkerLink

class Deaf:
    def on_lost(self, error):
        print("lost", error)
        os._exit(1)
    def on_changed(self, error): pass
    def on_left(self, rank, completed): pass

me = worker_env.read()
link = WorkerLink(me, worker_env.configure().timeouts, Deaf())
bind = lambda token, encrypt: f"tcp://127.0.0.1:{me.worker_id + 1}"

def changed():
    try:
        link.check()
    except RingChangedError:
        return True
    return False

generation = link.join(bind)
if generation is None:
    link.wait_for_feed()
    generation = link.next_generation(bind)
if ADMITS:
    link.admit()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("pid", os.getpid(), "restart", restart, "of", len(generation.members))
while not os.path.exists(GO):
    time.sleep(0.01)
    if asked:
        link.depart(7)
        sys.exit(143)
    if changed() or (link.joiners and link.offer(7, link.joiners, "127.0.0.1:9")):
        generation = link.next_generation(bind)
        print("now of", len(generation.members))
link.leave(0)
"""
"""Stays in the ring through all changes until the file GO is there; lets new workers in if ADMITS."""

QUICK = {"RINGPS_HEARTBEAT_TIMEOUT_S": "1", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1"}


def expect_on_stderr(command: Ringps, text: str) -> None:
    """Read stderr up to the line that contains `text`."""
    assert command.process.stderr is not None
    seen = []
    for line in command.process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} on stderr: {seen}")


def pid_of(line: str) -> int:
    return int(line.split()[2])


class Site:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.go = directory / "go"
        self.events = directory / "events.jsonl"

    def start(self, *arguments: str | Path, admits: bool = True) -> Ringps:
        program = script(self.directory, f"GO, ADMITS = {str(self.go)!r}, {admits}\n{MEMBER}")
        return start("run", *arguments, "--events", self.events, program, environ=QUICK)

    def end(self, *commands: Ringps) -> list[str]:
        """Let the job end, which it must do well; the last line of each command."""
        self.go.touch()
        done = [command.finish() for command in commands]
        assert [finished.code for finished in done] == [0] * len(done), done
        return [finished.last for finished in done]

    def happened(self, *names: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [event for event in events if event["event"] in names]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, r"process killed by signal 9 \(SIGKILL\)"),
        (signal.SIGSTOP, r"process killed by signal 9 \(SIGKILL\) by its launcher: .*no heartbeat.*"),
        (signal.SIGTERM, r"asked to leave \(SIGTERM\)"),
    ],
)
def test_a_member_that_is_lost_is_replaced_and_the_job_ends_well(
    site: Site, number: signal.Signals, reason: str
) -> None:
    with site.start("-n", "3") as command:
        *_, victim = command.expect_all("[0] pid", "[1] pid", "[2] pid")
        os.kill(pid_of(victim), number)
        assert command.expect("[2] pid").endswith("restart 1 of 3")
        [last] = site.end(command)
    assert re.fullmatch(
        rf"ringps: done; 1 worker was lost on the way \(worker 2: {reason}\) and 1 replaced", last
    ), last
    assert [len(event["members"]) for event in site.happened("generation")] == [3, 2, 3]
    assert len(site.happened("worker_restarting")) == 1


def test_a_ring_that_takes_nobody_in_goes_on_without_the_lost_one(site: Site) -> None:
    with site.start("-n", "3", admits=False) as command:
        *_, victim = command.expect_all("[0] pid", "[1] pid", "[2] pid")
        os.kill(pid_of(victim), signal.SIGKILL)
        command.expect_all("[0] now of 2", "[1] now of 2")
        [last] = site.end(command)
    assert last.endswith("(worker 2: process killed by signal 9 (SIGKILL)) and none replaced")
    assert site.happened("worker_restarting") == []


def test_below_the_least_number_of_workers_the_job_ends(site: Site) -> None:
    with site.start("-n", "3", "--min-workers", "3") as command:
        *_, victim = command.expect_all("[0] pid", "[1] pid", "[2] pid")
        os.kill(pid_of(victim), signal.SIGKILL)
        done = command.finish()
    assert done.code == 137
    assert done.last.startswith("ringps: rank 2 (worker 2 on ")
    assert site.happened("worker_restarting") == []


def test_a_worker_lost_while_the_coordinator_is_restarted_is_replaced(site: Site) -> None:
    key, address = site.directory / "job.key", f"127.0.0.1:{free_pair()}"

    def coordinator() -> Ringps:
        return start("coordinator", "--bind", address, "--key-file", key, "-n", "3", environ=QUICK)

    with coordinator() as first:
        first.expect("listens on")
        with site.start("-n", "3", "--join", address, "--key-file", key) as command:
            *_, victim = command.expect_all("[0] pid", "[1] pid", "[2] pid")
            first.send(signal.SIGKILL)
            first.finish()
            expect_on_stderr(command, "the workers go on without it")
            os.kill(pid_of(victim), signal.SIGKILL)
            expect_on_stderr(command, "the others go on, and the coordinator, once it is back, decides")
            with coordinator() as second:
                expect_on_stderr(command, "ringps: the coordinator is back")
                assert command.expect("[2] pid").endswith("restart 1 of 3")
                _, last = site.end(second, command)
    assert last.endswith("(worker 2: process killed by signal 9 (SIGKILL)) and 1 replaced")
