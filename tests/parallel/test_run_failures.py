"""`ringps run` on one machine: whoever dies, nothing stays behind (which the fixture checks)."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.launching import eventually_gone, run, script, start
from tests.leftovers import MARKER, processes_with

HANGS = "signal.pause()"
OBEYS = """
def stop(number, frame):
    print("stopping")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("pid", os.getpid())
signal.pause()
"""
STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: print("no"))
print("pid", os.getpid())
while True:
    signal.pause()
"""
WITH_CHILD = """
child = subprocess.Popen(["sleep", "1000"])
print("pid", os.getpid(), "child", child.pid)
signal.pause()
"""


def pids(line: str) -> list[int]:
    """The process ids that a worker printed."""
    return [int(number) for number in re.findall(r"(?:pid|child) (\d+)", line)]


def test_a_killed_worker_ends_the_others_and_is_named(tmp_path: Path) -> None:
    program = script(tmp_path, OBEYS)
    with start("run", "-n", "3", "--host", "node-a", program) as command:
        lines = command.expect_all("[0] pid", "[1] pid", "[2] pid")
        os.kill(pids(lines[1])[0], signal.SIGKILL)
        done = command.finish()
    assert done.code == 137
    assert sorted(done.out.splitlines()) == ["[0] stopping", "[2] stopping"]
    assert done.last.startswith(
        "ringps: rank 1 (worker 1 on node-a) failed: process killed by signal 9 (SIGKILL); "
    )


def test_the_others_have_time_to_raise_their_own_errors(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        f"""
        os.chdir({str(tmp_path)!r})
        if RANK == 0:
            open("part", "w").write(str(os.getpid()))
            os.rename("part", "pid")
            sys.exit(3)
        while not os.path.exists("pid"):
            time.sleep(0.01)
        pid = int(open("pid").read())
        while os.path.exists(f"/proc/{{pid}}"):
            time.sleep(0.01)
        raise RuntimeError("rank 0 is gone")
        """,
    )
    done = run("run", "-n", "2", program)
    assert done.code == 3
    assert "[1] RuntimeError: rank 0 is gone\n" in done.err
    assert done.last.startswith("ringps: rank 0 ")


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    program = script(tmp_path, "if RANK == 0: sys.exit(4)\n" + STUBBORN)
    done = run("run", "-n", "2", "--grace", "0.5", program)
    assert done.code == 4
    assert "ringps: killing rank 1: not gone 0.5 s after SIGTERM\n" in done.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_launcher_stops_the_workers(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with start("run", "-n", "2", script(tmp_path, OBEYS)) as command:
        command.expect_all("[0] pid", "[1] pid")
        command.send(number)
        done = command.finish()
    assert done.code == code
    assert sorted(done.out.splitlines()) == ["[0] stopping", "[1] stopping"]
    assert done.last == f"ringps: stopped: got {number.name}"
    assert "Traceback" not in done.err


def test_a_second_ctrl_c_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    with start("run", "-n", "1", "--grace", "100000", script(tmp_path, STUBBORN)) as command:
        command.expect("pid")
        command.send(signal.SIGINT)
        command.expect("no")
        command.send(signal.SIGINT)
        done = command.finish()
    assert done.code == 130
    assert "ringps: killing rank 0: asked again\n" in done.err


def test_a_stopped_worker_is_killed_too(tmp_path: Path) -> None:
    with start("run", "-n", "1", "--grace", "0.5", script(tmp_path, OBEYS)) as command:
        os.kill(pids(command.expect("pid"))[0], signal.SIGSTOP)
        command.send(signal.SIGTERM)
        assert command.finish().code == 143


def test_the_launcher_killed_takes_workers_and_their_children_along(tmp_path: Path) -> None:
    with start("run", "-n", "2", script(tmp_path, WITH_CHILD)) as command:
        lines = command.expect_all("[0] pid", "[1] pid")
        command.send(signal.SIGKILL)
        command.finish()
        assert all(eventually_gone(pid) for line in lines for pid in pids(line))


@pytest.mark.parametrize("processes", range(1, 6))
def test_the_launcher_killed_while_it_starts_leaves_nothing(tmp_path: Path, processes: int) -> None:
    """Killed when it, its guard, and each of three workers have just appeared."""
    program = script(tmp_path, WITH_CHILD)
    with start("run", "-n", "3", program) as command:
        end_s = time.monotonic() + 30
        while len(processes_with(os.environ[MARKER])) < processes:
            assert time.monotonic() < end_s and command.process.poll() is None
        command.send(signal.SIGKILL)
        command.finish()


def test_a_killed_guard_is_replaced(tmp_path: Path) -> None:
    with start("run", "-n", "2", script(tmp_path, WITH_CHILD)) as command:
        lines = command.expect_all("[0] pid", "[1] pid")
        everything = processes_with(os.environ[MARKER])
        [guard] = [pid for pid, name in everything.items() if "guard_process" in name]
        os.kill(guard, signal.SIGKILL)
        assert command.process.stderr is not None
        assert "guard" in command.process.stderr.readline()
        command.send(signal.SIGKILL)
        command.finish()
        assert all(eventually_gone(pid) for line in lines for pid in pids(line))


def test_ctrl_c_of_a_terminal_does_not_reach_workers_or_guard(tmp_path: Path) -> None:
    """The terminal signals the launcher's whole process group."""
    with start("run", "-n", "2", script(tmp_path, OBEYS)) as command:
        command.expect_all("[0] pid", "[1] pid")
        os.killpg(command.process.pid, signal.SIGINT)
        done = command.finish()
    assert done.code == 130
    assert "KeyboardInterrupt" not in done.err
