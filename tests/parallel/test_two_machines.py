"""`ringps coordinator` and `ringps run --join`: several machines, made of loopback addresses and of
network namespaces."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import MEMBER, Ringps, eventually_gone, run, script, start
from tests.support import require

PLAIN = """
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR"
print(*(os.environ[name] for name in names.split()))
"""
WAITS = """
print("pid", os.getpid())
signal.pause()
"""


@contextlib.contextmanager
def coordinator(
    key: Path, *arguments: str | Path, bind: str = "127.0.0.1:0", within: tuple[str, ...] = ()
) -> Iterator[tuple[Ringps, str]]:
    """A running `ringps coordinator`, which has written its key, and its address."""
    with start("coordinator", "--bind", bind, "--key-file", key, *arguments, within=within) as command:
        yield command, command.expect("listens on").split()[-1]


def machine(number: int, address: str, key: Path, *arguments: str | Path) -> Ringps:
    """A launcher of its own host name and loopback address, node-1 at 127.0.0.1 and so on."""
    where = ["--address", f"127.0.0.{number}", "--host", f"node-{number}"]
    return start("run", "--join", address, "--key-file", key, *where, *arguments)


def test_workers_are_numbered_over_both_machines(tmp_path: Path) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, PLAIN)
    with coordinator(key, "-n", "3") as (service, address):
        assert key.stat().st_mode & 0o777 == 0o600
        with (
            machine(2, address, key, "-n", "2", program) as a,
            machine(3, address, key, "-n", "1", program) as b,
        ):
            done = [a.finish(), b.finish()]
        assert service.finish().code == 0
    assert [d.code for d in done] == [0, 0], done
    lines = sorted("".join(d.out for d in done).splitlines())
    first = "127.0.0.2" if "[0] " in done[0].out else "127.0.0.3"
    if first == "127.0.0.2":
        assert lines == [
            f"[0] 0 3 0 2 0 2 {first}",
            f"[1] 1 3 1 2 0 2 {first}",
            f"[2] 2 3 0 1 1 2 {first}",
        ]
    else:  # they came in the other order
        assert lines == [
            f"[0] 0 3 0 1 0 2 {first}",
            f"[1] 1 3 0 2 1 2 {first}",
            f"[2] 2 3 1 2 1 2 {first}",
        ]


def test_without_a_number_of_workers_the_job_is_those_who_come(tmp_path: Path) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, PLAIN)
    with coordinator(key) as (service, address):
        with machine(2, address, key, "-n", "2", program) as a:
            done = a.finish()
        ended = service.finish()
    assert (done.code, ended.code) == (0, 0)
    assert sorted(line.split()[2] for line in done.out.splitlines()) == ["2", "2"]


def test_a_worker_that_dies_on_one_machine_ends_both_launchers_and_is_named(tmp_path: Path) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, WAITS)
    with (
        coordinator(key, "-n", "2") as (service, address),
        machine(2, address, key, "-n", "1", program) as a,
        machine(3, address, key, "-n", "1", program) as b,
    ):
        a.expect("pid")
        victim = b.expect("pid")
        os.kill(int(victim.split()[-1]), signal.SIGKILL)
        left, right, ended = a.finish(), b.finish(), service.finish()
    assert [left.code, right.code, ended.code] == [137, 137, 137], (left, right, ended)
    rank = victim[1]
    named = f"ringps: rank {rank} (worker {rank} on node-3) failed: process killed by signal 9 (SIGKILL)"
    assert right.last == f"{named}; its output is above; --log-dir DIR keeps it in a file"
    assert left.last == f"{named}; its output is at the launcher on node-3"
    assert named in ended.last


def test_a_machine_that_is_lost_ends_a_fixed_ring_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher is killed, so its guard kills the workers, and nobody is left to say so."""
    monkeypatch.setenv("RINGPS_HEARTBEAT_TIMEOUT_S", "1")
    monkeypatch.setenv("RINGPS_SHUTDOWN_TIMEOUT_S", "1")
    key, events, program = tmp_path / "job.key", tmp_path / "events", script(tmp_path, MEMBER)
    with (
        coordinator(key, "-n", "2", "--min-workers", "2", "--events", events) as (service, address),
        machine(2, address, key, "-n", "1", program) as a,
        machine(3, address, key, "-n", "1", program) as b,
    ):
        a.expect("pid")
        b.expect("pid")
        b.send(signal.SIGKILL)
        left, ended = a.finish(), service.finish()
    assert (left.code, ended.code) == (1, 1), (left, ended)
    assert "on node-3) failed: " in left.last
    assert "on node-3) failed: " in ended.last
    written = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["event"] for event in written] == ["generation", "worker_lost"]
    assert written[1]["host"] == "node-3"


def test_ctrl_c_on_one_machine_ends_the_other(tmp_path: Path) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, WAITS)
    with (
        coordinator(key, "-n", "2") as (service, address),
        machine(2, address, key, "-n", "1", program) as a,
        machine(3, address, key, "-n", "1", program) as b,
    ):
        a.expect("pid")
        b.expect("pid")
        b.send(signal.SIGINT)
        assert b.finish().code == 130
        left, ended = a.finish(), service.finish()
    assert (left.code, ended.code) == (143, 143)
    assert "its launcher was told to stop: got SIGINT" in left.last


def test_training_goes_on_without_the_coordinator(tmp_path: Path) -> None:
    key, go = tmp_path / "job.key", tmp_path / "go"
    program = script(
        tmp_path,
        f"""
        print("ready")
        while not os.path.exists({str(go)!r}):
            time.sleep(0.01)
        print("done")
        """,
    )
    with (
        coordinator(key, "-n", "2") as (service, address),
        machine(2, address, key, "-n", "1", program) as a,
        machine(3, address, key, "-n", "1", program) as b,
    ):
        a.expect("ready")
        b.expect("ready")
        service.send(signal.SIGKILL)
        service.finish()
        for launcher in (a, b):
            assert launcher.process.stderr is not None
            warning = launcher.process.stderr.readline()
            assert warning.startswith("ringps: ")
            assert "go on" in warning
        go.touch()
        for launcher in (a, b):
            done = launcher.finish()
            assert (done.code, done.err) == (0, "")
            assert "done" in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_coordinator(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with coordinator(tmp_path / "job.key") as (service, _):
        service.send(number)
        done = service.finish()
    assert done.code == code
    assert "Traceback" not in done.err


def test_a_launcher_that_waits_for_others_can_be_interrupted(tmp_path: Path) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, PLAIN)
    with (
        coordinator(key, "-n", "2") as (service, address),
        machine(2, address, key, "-n", "1", program) as a,
    ):
        assert a.process.stderr is not None
        assert "waiting" in a.process.stderr.readline()
        a.send(signal.SIGINT)
        done = a.finish()
        assert (done.code, done.out) == (130, "")
        # Its place is free again.
        with machine(3, address, key, "-n", "2", program) as b:
            assert b.finish().code == 0
        assert service.finish().code == 0


def test_a_key_that_is_another_job_s_is_refused(tmp_path: Path) -> None:
    mine, other = tmp_path / "job.key", tmp_path / "other.key"
    with (
        coordinator(mine, "-n", "1") as (_, address),
        coordinator(other, "-n", "1"),
        machine(2, address, other, "-n", "1", script(tmp_path, PLAIN)) as a,
    ):
        done = a.finish()
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ringps: ")
    assert done.err.count("\n") == 1
    assert "key" in done.err


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    key = tmp_path / "job.key"
    with coordinator(key) as (service, address):
        service.send(signal.SIGTERM)
        service.finish()
    done = run(
        *("run", "-n", "1", "--join", address, "--key-file", key, script(tmp_path, PLAIN)),
        environ={"RINGPS_CONNECT_TIMEOUT_S": "0.5"},
    )
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ringps: ")
    assert done.err.count("\n") == 1
    assert address in done.err


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    key = tmp_path / "job.key"
    with coordinator(key) as (_, address):
        done = run("coordinator", "--bind", address, "--key-file", key)
    assert done.code == 1
    assert done.err.startswith("ringps: ")
    assert done.err.count("\n") == 1
    assert address in done.err


# Network namespaces: two kernels' worth of network, joined by a cable.

_NUMBERS = itertools.count()


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """Two network namespaces, at 10.77.0.1 and 10.77.0.2 on interfaces called `cable`."""
    require(os.geteuid() == 0, "needs root to make network namespaces")
    require(shutil.which("ip") is not None, "needs the `ip` command to make network namespaces")
    name = f"ringps-{os.getpid()}-{next(_NUMBERS)}"
    left, right = f"{name}-l", f"{name}-r"
    with contextlib.ExitStack() as stack:
        for namespace in (left, right):
            made = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
            require(made.returncode == 0, f"cannot make network namespaces: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
        ip(left, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", right)
        for namespace, address in ((left, "10.77.0.1/24"), (right, "10.77.0.2/24")):
            ip(namespace, "address", "add", address, "dev", "cable")
            ip(namespace, "link", "set", "cable", "up")
            ip(namespace, "link", "set", "lo", "up")
        yield left, right


def ip(namespace: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", namespace, *arguments], check=True)


def inside(namespace: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace)


def test_torch_distributed_over_two_network_namespaces(tmp_path: Path, cable: tuple[str, str]) -> None:
    key = tmp_path / "job.key"
    program = script(
        tmp_path,
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(value)
        print("sum", value.item(), "at", os.environ["RINGPS_ADDRESS"])
        dist.destroy_process_group()
        """,
    )
    bind, environ = "10.77.0.1:4700", {"GLOO_SOCKET_IFNAME": "cable"}
    options = ("--join", bind, "--key-file", key, program)
    with (
        coordinator(key, "-n", "3", bind=bind, within=inside(cable[0])) as (service, _),
        start("run", "-n", "2", *options, environ=environ, within=inside(cable[0])) as left,
        start("run", "-n", "1", *options, environ=environ, within=inside(cable[1])) as right,
    ):
        a, b = left.finish(), right.finish()
        assert service.finish().code == 0
    assert (a.code, b.code) == (0, 0), (a, b)
    assert [line[4:] for line in a.out.splitlines()] == ["sum 6.0 at 10.77.0.1"] * 2
    assert [line[4:] for line in b.out.splitlines()] == ["sum 6.0 at 10.77.0.2"]


def test_a_worker_that_dies_in_another_network_namespace(tmp_path: Path, cable: tuple[str, str]) -> None:
    key, program = tmp_path / "job.key", script(tmp_path, WAITS)
    bind = "10.77.0.1:4700"
    options = ("run", "-n", "1", "--join", bind, "--key-file", key)
    with (
        coordinator(key, "-n", "2", bind=bind, within=inside(cable[0])) as (service, _),
        start(*options, "--host", "here", program, within=inside(cable[0])) as left,
        start(*options, "--host", "there", program, within=inside(cable[1])) as right,
    ):
        left.expect("pid")
        victim = int(right.expect("pid").split()[-1])
        os.kill(victim, signal.SIGKILL)
        assert eventually_gone(victim)
        codes = [command.finish() for command in (left, right, service)]
    assert [done.code for done in codes] == [137, 137, 137], codes
    assert all(" on there) failed: process killed by signal 9" in done.last for done in codes)
