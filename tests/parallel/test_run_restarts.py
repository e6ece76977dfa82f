"""`ringps run` and what the coordinator says of lost workers, spoken by a test."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ringps.membership import Expel, JobDone, JobFailed, JobKey, Replaceable
from ringps.wire.control import LauncherLeaving, WorkerExited
from tests.launching import Ringps, script, start
from tests.scripted import ScriptedCoordinator

WAITS = """
K = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("pid", os.getpid(), "restart", K)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
signal.pause()
"""
"""Ends well on SIGUSR1."""


def pid_of(command: Ringps, rank: int, restart: int = 0) -> int:
    line = command.expect_all(f"[{rank}] pid")[0]
    pid, count = map(int, re.findall(r"\d+", line.split("pid")[1]))
    assert count == restart
    return pid


def pids_of(command: Ringps) -> list[int]:
    """Of ranks 0 and 1."""
    return [int(line.split()[2]) for line in command.expect_all("[0] pid", "[1] pid")]


def stderr_line(command: Ringps) -> str:
    assert command.process.stderr is not None
    return command.process.stderr.readline().rstrip("\n")


class Site:
    """A job of two workers on one machine, with a scripted coordinator."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = JobKey.generate()
        self.key_file = directory / "job.key"
        self.key.save(self.key_file)
        self.events = directory / "events.jsonl"
        self.logs = directory / "logs"

    def coordinator(self, port: int | None = None) -> ScriptedCoordinator:
        return ScriptedCoordinator(self.key, port)

    def start(self, coordinator: ScriptedCoordinator, *arguments: str, **environ: str) -> Ringps:
        where = ("--join", coordinator.address, "--key-file", self.key_file, "--host", "node-a")
        program = script(self.directory, WAITS)
        return start(
            *("run", "-n", "2", *where, "--events", self.events, "--log-dir", self.logs),
            *(*arguments, program),
            environ=environ,
        )

    def happened(self, name: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [event for event in events if event["event"] == name]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def end_well(coordinator: ScriptedCoordinator, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
        heard = coordinator.hear(WorkerExited)
        assert (heard.pid, heard.code) == (pid, 0)
    coordinator.say(JobDone())


def test_a_lost_worker_is_replaced_and_the_job_ends_well(site: Site) -> None:
    with site.coordinator() as coordinator, site.start(coordinator, "--max-restarts", "2") as command:
        coordinator.assign(2)
        survivor, victim = pids_of(command)
        os.kill(victim, signal.SIGKILL)
        exited = coordinator.hear(WorkerExited)
        assert (exited.worker_id, exited.pid, exited.code) == (1, victim, 137)
        coordinator.say(Replaceable(worker_id=1, reason="lost"))
        assert stderr_line(command) == (
            "ringps: worker 1 lost: process killed by signal 9 (SIGKILL); "
            "a new one starts in 0.2 s (1 of 2 restarts left)"
        )
        end_well(coordinator, survivor, pid_of(command, 1, restart=1))
        done = command.finish()
    assert done.code == 0
    assert done.last == (
        "ringps: done; 1 worker was lost on the way "
        "(worker 1: process killed by signal 9 (SIGKILL)) and 1 replaced"
    )
    log = (site.logs / "rank-1.log").read_text()
    assert log.splitlines()[0] == f"pid {victim} restart 0", "kept when the replacement wrote on"
    assert re.fullmatch(r"pid \d+ restart 1", log.splitlines()[1])
    [restarting] = site.happened("worker_restarting")
    assert (restarting["worker_id"], restarting["delay_s"], restarting["restarts_left"]) == (1, 0.2, 1)
    assert [event.get("restart") for event in site.happened("worker_started")] == [None, None, 1]
    assert [event["code"] for event in site.happened("worker_exited")] == [137, 0, 0]


def test_without_restarts_the_others_go_on(site: Site) -> None:
    with site.coordinator() as coordinator, site.start(coordinator, "--max-restarts", "0") as command:
        coordinator.assign(2)
        survivor, victim = pids_of(command)
        os.kill(victim, signal.SIGTERM)
        coordinator.hear(WorkerExited)
        coordinator.say(Replaceable(worker_id=1, reason="lost"))
        assert "the restarts are used up (--max-restarts 0), the others go on" in stderr_line(command)
        end_well(coordinator, survivor)
        done = command.finish()
    assert (done.code, site.happened("worker_restarting")) == (0, [])
    assert done.last.endswith("and none replaced")


def test_a_frozen_worker_is_expelled_then_replaced(site: Site) -> None:
    with site.coordinator() as coordinator, site.start(coordinator) as command:
        coordinator.assign(2)
        survivor, frozen = pids_of(command)
        os.kill(frozen, signal.SIGSTOP)
        coordinator.say(Replaceable(worker_id=1, reason="no heartbeat for 5 s"))
        coordinator.say(Expel(worker_id=1, pid=survivor, reason="not this one"))
        coordinator.say(Expel(worker_id=1, pid=frozen, reason="no heartbeat for 5 s"))
        exited = coordinator.hear(WorkerExited)
        assert (exited.worker_id, exited.code) == (1, 137)
        assert exited.reason.endswith(" by its launcher: no heartbeat for 5 s")
        end_well(coordinator, survivor, pid_of(command, 1, restart=1))
        done = command.finish()
    assert done.code == 0
    assert "ringps: killing worker 1: the others went on without it: no heartbeat for 5 s\n" in done.err


def test_a_failed_job_ends_although_restarts_are_left(site: Site) -> None:
    with site.coordinator() as coordinator, site.start(coordinator) as command:
        coordinator.assign(2)
        _, victim = pids_of(command)
        os.kill(victim, signal.SIGKILL)
        exited = coordinator.hear(WorkerExited)
        coordinator.say(JobFailed(worker_id=1, rank=1, host="node-a", code=137, reason=exited.reason))
        done = command.finish()
    assert done.code == 137
    assert done.last.startswith("ringps: rank 1 (worker 1 on node-a) failed: process killed by signal 9")
    assert site.happened("worker_restarting") == []


def test_without_any_word_the_job_ends(site: Site) -> None:
    quick = {"RINGPS_HEARTBEAT_TIMEOUT_S": "0.5", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1"}
    with site.coordinator() as coordinator, site.start(coordinator, **quick) as command:
        coordinator.assign(2)
        _, victim = pids_of(command)
        os.kill(victim, signal.SIGKILL)
        coordinator.hear(WorkerExited)
        done = command.finish()
    assert done.code == 137
    assert "ringps: no word from the coordinator on worker 1 for 2.5 s; stopping the others\n" in done.err
    assert done.last.startswith("ringps: rank 1 (worker 1 on node-a) failed: process killed by signal 9")


def test_a_worker_lost_while_the_coordinator_is_away_is_replaced_once_it_is_back(site: Site) -> None:
    quick = {"RINGPS_HEARTBEAT_TIMEOUT_S": "0.5", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1"}
    with ExitStack() as stack:
        with site.coordinator() as first:
            command = stack.enter_context(site.start(first, **quick))
            first.assign(2)
            survivor, victim = pids_of(command)
        assert "the workers go on without it" in stderr_line(command)
        os.kill(victim, signal.SIGKILL)
        assert stderr_line(command) == (
            "ringps: worker 1 lost: process killed by signal 9 (SIGKILL); the others go on, "
            "and the coordinator, once it is back, decides whether it is replaced"
        )
        with site.coordinator(first.port) as second:
            hello = second.assign(2)
            assert (hello.first_worker_id, hello.world_size) == (0, 2)
            assert stderr_line(command) == "ringps: the coordinator is back"
            for _ in range(2):  # what a new one is told, and what waited for it
                assert second.hear(WorkerExited).pid == victim
            second.say(Replaceable(worker_id=1, reason="lost"))
            end_well(second, survivor, pid_of(command, 1, restart=1))
            assert command.finish().code == 0


def test_to_start_the_ring_again_a_coordinator_that_is_away_is_waited_for(site: Site) -> None:
    quick = {"RINGPS_CONNECT_TIMEOUT_S": "1"}
    with ExitStack() as stack:
        with site.coordinator() as first:
            command = stack.enter_context(site.start(first, **quick))
            first.assign(2)
            _, victim = pids_of(command)
            os.kill(victim, signal.SIGKILL)
            first.hear(WorkerExited)
            first.say(Replaceable(worker_id=1, reason="lost"))
            assert stderr_line(command).endswith("(2 of 3 restarts left)")
            pid_of(command, 1, restart=1)
            failed = {"worker_id": 1, "rank": 1, "host": "node-a", "code": 137, "reason": "why"}
            first.say(JobFailed(**failed, restarts=True))
            assert stderr_line(command) == "ringps: killing rank 0, 1: the whole ring is started again"
            assert {first.hear(WorkerExited).code for _ in range(2)} == {137}
            first.hear(LauncherLeaving)
        assert stderr_line(command) == (
            "ringps: rank 1 (worker 1 on node-a) failed: why; "
            "the coordinator starts the whole ring again from the latest checkpoint"
        )
        assert "; trying again for 29" in stderr_line(command)
        with site.coordinator(first.port) as second:
            hello = second.assign(2)
            assert (hello.first_worker_id, hello.world_size) == (None, None), "as at the first start"
            again = pids_of(command)
            end_well(second, *again)
            assert command.finish().code == 0
    assert [event.get("restart") for event in site.happened("worker_started")] == [None, None, 1, 2, 2]
    log = (site.logs / "rank-0.log").read_text().splitlines()
    assert [line.split()[-1] for line in log] == ["0", "2"]


def test_ctrl_c_while_a_coordinator_is_waited_for(site: Site) -> None:
    with ExitStack() as stack:
        with site.coordinator() as coordinator:
            command = stack.enter_context(site.start(coordinator, RINGPS_CONNECT_TIMEOUT_S="1"))
            coordinator.assign(2)
            for pid in pids_of(command):
                os.kill(pid, signal.SIGKILL)
                coordinator.hear(WorkerExited)
            failed = {"worker_id": 1, "rank": 1, "host": "node-a", "code": 137, "reason": "why"}
            coordinator.say(JobFailed(**failed, restarts=True))
            coordinator.hear(LauncherLeaving)
        assert "starts the whole ring again" in stderr_line(command)
        assert "; trying again for" in stderr_line(command)
        command.send(signal.SIGINT)
        done = command.finish()
    assert (done.code, done.last) == (130, "ringps: stopped: got SIGINT")


def test_restarts_leave_no_descriptors_open(site: Site) -> None:
    with site.coordinator() as coordinator, site.start(coordinator) as command:
        coordinator.assign(2)
        survivor, victim = pids_of(command)
        opened = []
        for restart in (1, 2, 3):
            os.kill(victim, signal.SIGKILL)
            coordinator.hear(WorkerExited)
            coordinator.say(Replaceable(worker_id=1, reason="lost"))
            victim = pid_of(command, 1, restart)
            opened.append(len(os.listdir(f"/proc/{command.process.pid}/fd")))
        assert len(set(opened)) == 1, opened
        end_well(coordinator, survivor, victim)
        assert command.finish().code == 0
