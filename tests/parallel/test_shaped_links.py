"""Hosts with shaped links: they are as fast as they say, a ring runs between them, and nothing stays."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import eventually_gone
from tests.support import require

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(120)  # torch takes its time to load on busy cores
RATE_BIT_S = 200e6
MIB = 1024 * 1024


def load(name: str) -> Any:
    """A module beside the benchmark scripts, which import each other by plain names."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def hosts() -> Any:
    """The module, where hosts can be made."""
    module = load("hosts")
    obstacle = module.obstacle()
    require(obstacle is None, str(obstacle))
    return module


def running_in(namespace: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns/net") == namespace:
                found.add(int(entry.name))
        except OSError:
            continue  # gone meanwhile
    return found


def holders(network: Any) -> list[int]:
    shown = [
        subprocess.run(
            [*network.inside(host), "sh", "-c", "readlink /proc/$$/ns/net"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for host in range(network.count)
    ]
    return [pid for namespace in shown for pid in running_in(namespace)]


def test_an_all_reduce_takes_about_as_long_as_predicted(hosts: Any) -> None:
    calibrate, predict, link_model = load("calibrate"), load("predict"), load("link_model")
    size = 4 * MIB
    with hosts.Hosts(2, hosts.Shape(rate_bit_s=RATE_BIT_S)) as network:
        stream = min(network.streams(0.5))
        (found,) = network.measure([hosts.Point("all_reduce", size)], seconds=1.0)
    # A busy machine starves a stream, but nothing makes it faster than its link.
    assert 0.5 < 8 * stream / (hosts.TCP_SHARE * RATE_BIT_S) < 1.02
    costs = link_model.Costs(latency_s=2e-4, chunk_s=1e-4, copy_s_per_byte=1e-9, combine_s_per_byte=1e-9)
    cluster = calibrate.shaped(costs, network.shape, hosts.TCP_SHARE * RATE_BIT_S / 8)
    predicted_s = predict.all_reduce_s("ring", size, 2, cluster)
    assert 0.8 * predicted_s < min(found.times_s) < 2 * predicted_s


def test_nothing_is_left_when_a_block_fails(hosts: Any) -> None:
    left: list[int] = []

    def fail() -> None:
        with hosts.Hosts(2, None) as network:
            # Out of reach of whoever started it, as a worker is whose launcher was killed.
            subprocess.run([*network.inside(1), "setsid", "--fork", "sleep", "300"], check=True)
            left.extend(holders(network))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(left) >= 3
    assert all(eventually_gone(pid) for pid in left)


def test_nothing_is_left_when_the_process_is_killed(hosts: Any) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import hosts
with hosts.Hosts(2, None) as network:
    print(*network._holders, flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        held = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert len(held) == 2
    assert all(eventually_gone(pid) for pid in held)


def test_a_failure_says_what_the_workers_said(hosts: Any) -> None:
    with hosts.Hosts(2, None) as network, pytest.raises(hosts.HostsError, match="KeyError: 'no_such'"):
        network.measure([hosts.Point("no_such", 1024)])
