"""`ringps run` of a job that stops at a checkpoint, and of one whose whole ring is started again from it.

No torch in most scripts: they only say that they have saved or restored something.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Finished, Ringps, eventually_gone, script, start

MEMBER = """
import json
from ringps import worker_env
from ringps.membership import WorkerLink

class Listener:
    def on_lost(self, error):
        os._exit(1)
    def on_changed(self, error): pass
    def on_left(self, rank, completed): pass

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
link = WorkerLink(worker_env.read(), worker_env.configure().timeouts, Listener())
generation = link.join(lambda token, encrypt: "tcp://127.0.0.1:9")
RESTART = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if RANK == 0:
    link.note({"event": "checkpoint_saved", "step": 3 + RESTART, "directory": "/mnt/ckpt"})
print("pid", os.getpid(), "restart", RESTART, "generation", generation.number)

def saved():
    # How many checkpoints the launcher has heard of.
    with open(EVENTS) as events:
        return sum('"checkpoint_saved"' in line for line in events)
"""
"""Joins the ring, and has saved a checkpoint when it prints its line."""

STAYS = """
while not os.path.exists(GO) and not asked:
    time.sleep(0.01)
link.leave(0, suspended=bool(asked))
sys.exit(75 if asked else 0)
"""
"""Ends well when the file GO is there, and at a checkpoint on SIGTERM."""

FAILS = """
while RANK == 0 or saved() <= RESTART:
    time.sleep(0.01)
os._exit(3)
"""
"""Rank 1 fails, in every start of the ring, as soon as its checkpoint is saved."""

QUICK = {"RINGPS_HEARTBEAT_TIMEOUT_S": "2", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1"}
LIMIT_S = 30.0


class Site:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.go = directory / "go"
        self.key = directory / "job.key"

    def events(self, name: str = "events") -> Path:
        return self.directory / name

    def script(self, text: str, *, member: bool = True) -> Path:
        given = f"GO, EVENTS = {str(self.go)!r}, {str(self.events())!r}\n"
        return script(self.directory, given + (MEMBER if member else "") + text)

    def start(self, text: str, *arguments: str | Path, member: bool = True) -> Ringps:
        program = self.script(text, member=member)
        where = ("--host", "node-a", "--events", self.events())
        return start("run", *where, *arguments, program, environ=QUICK)

    def happened(self, event: str, name: str = "events") -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            written = [json.loads(line) for line in self.events(name).read_text().splitlines()]
            return [entry for entry in written if entry["event"] == event]
        return []

    def await_saved(self, count: int = 1) -> None:
        """Wait until the launcher has heard of that many checkpoints."""
        end_s = time.monotonic() + LIMIT_S
        while len(self.happened("checkpoint_saved")) < count and time.monotonic() < end_s:
            time.sleep(0.01)
        assert len(self.happened("checkpoint_saved")) == count


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def stderr_with(command: Ringps, text: str) -> str:
    """Read stderr up to the line that contains `text`."""
    assert command.process.stderr is not None
    seen = []
    for line in command.process.stderr:
        seen.append(line)
        if text in line:
            return line.rstrip("\n")
    raise AssertionError(f"no {text!r} on stderr: {seen}")


def pid_in(line: str) -> int:
    return int(line.split()[2])


STOPPED = (
    "ringps: stopped after step 3, which is saved in /mnt/ckpt; the same command goes on from there "
    "(exit code 75)"
)


class TestStoppingAtACheckpoint:
    @pytest.mark.parametrize(("number", "least"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
    def test_a_signal_to_the_launcher(self, site: Site, number: signal.Signals, least: str) -> None:
        with site.start(STAYS, "-n", "2", "--min-workers", least) as command:
            command.expect_all("[0] pid", "[1] pid")
            site.await_saved()
            command.send(number)
            done = command.finish()
        assert (done.code, done.last) == (75, STOPPED), done
        assert [event["code"] for event in site.happened("worker_exited")] == [75, 75]
        assert site.happened("worker_lost") == []

    def test_workers_that_were_not_asked_by_their_launcher(self, site: Site) -> None:
        with site.start(STAYS, "-n", "2", "--min-workers", "2") as command:
            pids = [pid_in(line) for line in command.expect_all("[0] pid", "[1] pid")]
            site.await_saved()
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            done = command.finish()
        assert (done.code, done.last) == (75, STOPPED), done

    def test_a_worker_that_exits_so_without_leaving_the_ring_has_failed(self, site: Site) -> None:
        fixed = ("-n", "2", "--min-workers", "2", "--max-restarts", "0")
        with site.start("if RANK == 1: os._exit(75)" + STAYS, *fixed) as command:
            done = command.finish()
        assert done.code == 75
        assert done.last.startswith("ringps: rank 1 (worker 1 on node-a) failed: process exited with code 75")

    def test_a_script_that_does_not_save_is_stopped_as_ever(self, site: Site) -> None:
        text = 'signal.signal(signal.SIGTERM, signal.SIG_DFL)\nprint("set")\nsignal.pause()'
        with site.start(text, "-n", "2") as command:
            command.expect_all("[0] set", "[1] set")
            command.send(signal.SIGTERM)
            done = command.finish()
        assert (done.code, done.last) == (143, "ringps: stopped: got SIGTERM")

    def test_all_of_a_job_on_two_machines(self, site: Site) -> None:
        with two_machines(site, STAYS) as (service, a, b):
            a.expect("pid")
            b.expect("pid")
            site.await_saved()
            a.send(signal.SIGTERM)
            b.send(signal.SIGINT)
            done = [command.finish() for command in (a, b, service)]
        assert [(entry.code, entry.last) for entry in done] == [(75, STOPPED)] * 3, done

    def test_without_a_coordinator_the_workers_word_counts(self, site: Site) -> None:
        with two_machines(site, STAYS) as (service, a, b):
            a.expect("pid")
            b.expect("pid")
            site.await_saved()
            service.send(signal.SIGKILL)
            stderr_with(a, "the workers go on without it")
            stderr_with(b, "the workers go on without it")
            a.send(signal.SIGTERM)
            b.send(signal.SIGTERM)
            done = [a.finish(), b.finish()]
        assert [entry.code for entry in done] == [75, 75], done
        # Whether they have heard of the checkpoint depends on the coordinator's last moments.
        assert all("the same command goes on from there (exit code 75)" in entry.last for entry in done)

    def test_a_script_with_a_ring_of_its_own(self, site: Site) -> None:
        text = """
        import ringps
        ringps.init()
        from ringps import runtime
        regroup = runtime._ring.regroup
        if RANK == 0:
            regroup.note("checkpoint_saved", step=3, directory="/mnt/ckpt")
        regroup.suspended = True
        raise SystemExit(75)
        """
        with site.start(textwrap.dedent(text), "-n", "2", "--min-workers", "2", member=False) as command:
            done = command.finish()
        assert (done.code, done.last) == (75, STOPPED), done


def again(rank: int, left: int, of: int, reason: str) -> str:
    return (
        f"ringps: rank {rank} (worker {rank} on node-a) failed: {reason}; "
        f"starting the whole ring again from the latest checkpoint ({left} of {of} restarts left)"
    )


KILLED = "process killed by signal 9 (SIGKILL)"


class TestStartingTheRingAgain:
    def test_a_fixed_ring_that_lost_a_worker(self, site: Site) -> None:
        logs = site.directory / "logs"
        with site.start(STAYS, "-n", "2", "--min-workers", "2", "--log-dir", logs) as command:
            first, victim = command.expect_all("[0] pid", "[1] pid")
            site.await_saved()
            os.kill(pid_in(victim), signal.SIGKILL)
            assert stderr_with(command, "starting the whole ring") == again(1, 2, 3, KILLED)
            second = command.expect_all("[0] pid", "[1] pid")
            assert all(line.endswith("restart 1 generation 12") for line in second), second
            assert eventually_gone(pid_in(first))
            site.go.touch()
            done = command.finish()
        assert (done.code, done.err) == (0, ""), done
        [restarting] = site.happened("ring_restarting")
        assert restarting["reason"] == f"rank 1 (worker 1 on node-a) failed: {KILLED}"
        assert (restarting["restarts_left"], restarting["delay_s"]) == (2, 0.2)
        assert [event["generation"] for event in site.happened("generation")] == [1, 12]
        assert [event.get("restart") for event in site.happened("worker_started")] == [None, None, 1, 1]
        starts = [line.split()[3] for line in (logs / "rank-1.log").read_text().splitlines()]
        assert starts == ["0", "1"], "the log of both starts"

    def test_an_elastic_ring_that_lost_too_many(self, site: Site) -> None:
        with site.start(STAYS, "-n", "3", "--min-workers", "3") as command:
            lines = command.expect_all("[0] pid", "[1] pid", "[2] pid")
            site.await_saved()
            os.kill(pid_in(lines[0]), signal.SIGKILL)
            stderr_with(command, "starting the whole ring again")
            command.expect_all("[0] pid", "[1] pid", "[2] pid")
            site.await_saved(2)
            command.send(signal.SIGTERM)
            done = command.finish()
        assert done.code == 75
        assert done.last == STOPPED.replace("step 3", "step 4")

    def test_until_the_restarts_are_used_up(self, site: Site) -> None:
        with site.start(FAILS, "-n", "2", "--min-workers", "2", "--max-restarts", "1") as command:
            done = command.finish()
        assert done.code == 3
        reason = "process exited with code 3"
        assert again(1, 0, 1, reason) in done.err.splitlines()
        assert done.last == (
            f"ringps: rank 1 (worker 1 on node-a) failed: {reason}; the restarts are used up "
            "(--max-restarts 1); its output is above; --log-dir DIR keeps it in a file"
        )
        assert [event["delay_s"] for event in site.happened("ring_restarting")] == [0.2]

    def test_not_without_a_checkpoint(self, site: Site) -> None:
        text = "if RANK == 1: os._exit(3)\nsignal.pause()"
        late = MEMBER.replace("checkpoint_saved", "checkpoint_late") + text
        with site.start(late, "-n", "2", "--min-workers", "2", member=False) as command:
            done = command.finish()
        assert done.code == 3
        assert done.last == (
            "ringps: rank 1 (worker 1 on node-a) failed: process exited with code 3; "
            "its output is above; --log-dir DIR keeps it in a file"
        )
        assert site.happened("ring_restarting") == []

    def test_sigterm_in_the_delay_ends_the_job(self, site: Site) -> None:
        with site.start(FAILS, "-n", "2", "--min-workers", "2", "--max-restarts", "9") as command:
            for left in (8, 7, 6, 5):  # by then the delay is 1.6 s
                assert stderr_with(command, "starting the whole ring") == again(
                    1, left, 9, "process exited with code 3"
                )
            command.send(signal.SIGTERM)
            done = command.finish()
        assert (done.code, done.last) == (143, "ringps: stopped: got SIGTERM"), done
        assert [event["delay_s"] for event in site.happened("ring_restarting")] == [0.2, 0.4, 0.8, 1.6]
        assert len(site.happened("worker_started")) == 2 * 4

    def test_on_two_machines(self, site: Site) -> None:
        with two_machines(site, STAYS) as (service, a, b):
            line = a.expect("pid")
            b.expect("pid")
            site.await_saved()
            os.kill(pid_in(line), signal.SIGKILL)
            rank = line[1]
            failed = f"ringps: rank {rank} (worker {rank} on node-1) failed: {KILLED}"
            assert stderr_with(service, "starting the whole ring") == (
                f"{failed}; starting the whole ring again from the latest checkpoint (0 of 1 restarts left)"
            )
            for command in (a, b):
                assert stderr_with(command, "starts the whole ring") == (
                    f"{failed}; the coordinator starts the whole ring again from the latest checkpoint"
                )
            for command in (a, b):
                assert command.expect("pid").endswith("restart 1 generation 12")
            site.go.touch()
            done = [command.finish() for command in (a, b, service)]
        assert [entry.code for entry in done] == [0, 0, 0], done
        for name in ("events", "coordinator"):
            [restarting] = site.happened("ring_restarting", name)
            assert (restarting["restarts_left"], restarting["delay_s"]) == (0, 0.2)

    def test_on_two_machines_until_the_restarts_are_used_up(self, site: Site) -> None:
        done: list[Finished] = []
        with two_machines(site, FAILS) as (service, a, b):
            done = [command.finish() for command in (a, b, service)]
        assert [entry.code for entry in done] == [3, 3, 3], done
        words = "failed: process exited with code 3; the restarts are used up (--max-restarts 1)"
        assert all(words in entry.last for entry in done), done


@contextlib.contextmanager
def two_machines(site: Site, text: str) -> Iterator[tuple[Ringps, Ringps, Ringps]]:
    """A coordinator whose ring is fixed and may be started again once, and two launchers. The first one's
    events are the site's."""
    serve = ("--bind", "127.0.0.1:0", "--key-file", site.key, "-n", "2", "--min-workers", "2")
    program = site.script(text)
    with start(
        *("coordinator", *serve, "--max-restarts", "1", "--events", site.events("coordinator")),
        environ=QUICK,
    ) as service:
        address = service.expect("listens on").split()[-1]

        def machine(number: int, *arguments: str | Path) -> Ringps:
            where = ("--address", f"127.0.0.{number}", "--host", f"node-{number}")
            joined = ("--join", address, "--key-file", site.key)
            return start("run", "-n", "1", *joined, *where, *arguments, program, environ=QUICK)

        with machine(1, "--events", site.events()) as a, machine(2) as b:
            yield service, a, b
