from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ringps_launcher import gate, guard_process
from ringps_launcher.guard import Guard


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"], start_new_session=True)


def test_the_guard_kills_what_it_watches_and_nothing_else(tmp_path: Path) -> None:
    guard = Guard()
    with sleeper() as watched, sleeper() as forgotten:
        for process in (watched, forgotten):
            guard.watch(process.pid)
        guard.unwatch(forgotten.pid)
        guard.close()
        assert watched.wait() == -signal.SIGKILL
        assert forgotten.poll() is None
        forgotten.kill()


def test_the_guard_removes_directories_with_odd_names(tmp_path: Path) -> None:
    directory = tmp_path / "with\nnewline and \udcff"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "file").write_text("x")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (directory / "link").symlink_to(kept)
    guard = Guard()
    guard.remove(str(directory))
    guard.remove(str(tmp_path / "never made"))
    guard.close()
    assert not directory.exists()
    assert (kept / "file").exists()


def test_a_killed_guard_is_replaced_with_all_it_knew(tmp_path: Path) -> None:
    guard = Guard()
    directory = tmp_path / "job"
    directory.mkdir()
    with sleeper() as watched:
        guard.watch(watched.pid)
        guard.remove(str(directory))
        signal.pidfd_send_signal(guard.pidfd, signal.SIGKILL)
        guard.replace()
        guard.close()
        assert watched.wait() == -signal.SIGKILL
    assert not directory.exists()


def test_ending_signals_do_not_take_the_guard_away() -> None:
    guard = Guard()
    with sleeper() as watched:
        # Wait until its signal handlers are in place.
        status = Path(f"/proc/{guard._process.pid}/status")
        endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        wanted = sum(1 << (number - 1) for number in endings)  # some a shell's background jobs ignore anyway
        ignored = 0
        while ignored & wanted != wanted:
            line = next(line for line in status.read_text().splitlines() if line.startswith("SigIgn"))
            ignored = int(line.split()[1], 16)
        for number in endings:
            signal.pidfd_send_signal(guard.pidfd, number)
        guard.watch(watched.pid)
        guard.close()
        assert watched.wait() == -signal.SIGKILL


def test_a_worker_whose_launcher_dies_before_the_gate_opens_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    command = [sys.executable, "-I", "-S", gate.__file__, "touch", str(ran)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 1
    assert not ran.exists()
    subprocess.run(command, input=b"g", check=True)
    assert ran.exists()


def test_the_gate_names_a_program_that_cannot_be_started() -> None:
    command = [sys.executable, "-I", "-S", gate.__file__, "/absent/python"]
    done = subprocess.run(command, input=b"g", capture_output=True)
    assert done.returncode == 127
    assert done.stderr == b"cannot start /absent/python: No such file or directory\n"


@pytest.mark.parametrize("module", [gate, guard_process])
def test_the_helpers_load_next_to_nothing(module: ModuleType) -> None:
    text = Path(str(module.__file__)).read_text()
    imports = {line.split()[1] for line in text.splitlines() if line.startswith("import ")}
    assert imports <= {"os", "signal", "sys"}
