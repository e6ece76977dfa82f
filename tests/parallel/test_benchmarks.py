"""The benchmarks run and report what they should; how fast is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

LIMIT_S = 180  # torch takes its time to load in many processes on two cores
pytestmark = pytest.mark.timeout(LIMIT_S)

ROW = {
    "bench", "backend", "op", "bytes", "dtype", "world_size", "repeats", "time_us", "time_us_min",
    "time_us_max", "algbw_gbps", "busbw_gbps", "env",
}  # fmt: skip
QUICK = ("--sizes", "1K,64K", "--seconds", "0.05", "--min-repeats", "3")


def start(*command: str) -> str:
    """Run a Python program; what it printed to stdout."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S - 10,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_all_reduce_starts_its_own_workers(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    out = start("benchmarks/allreduce.py", "-n", "2,3", *QUICK, "--json", str(results))
    rows = json.loads(results.read_text())
    points = {(row["world_size"], row["bytes"], row["backend"]) for row in rows}
    assert points == {
        (n, size, backend) for n in (2, 3) for size in (1024, 65536) for backend in ("ringps-tcp", "gloo")
    }
    for row in rows:
        n = row["world_size"]
        assert set(row) == ROW
        assert row["time_us_min"] <= row["time_us"] <= row["time_us_max"]
        assert row["algbw_gbps"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3, rel=1e-2)
        assert row["busbw_gbps"] == pytest.approx(row["algbw_gbps"] * 2 * (n - 1) / n, rel=1e-2)
        assert {"cpu", "cores", "torch", "pyzmq", "commit"} <= set(row["env"])
    titles, *lines = out.splitlines()
    assert titles.split()[:3] == ["n", "size", "backend"]
    assert len(lines) == len(rows)


def test_all_reduce_runs_under_the_launcher() -> None:
    out = start("-m", "ringps_launcher", "run", "-n", "2", "benchmarks/allreduce.py", *QUICK)
    assert out.count("ringps-tcp") == 2
    assert out.count("[0]") == len(out.splitlines())
