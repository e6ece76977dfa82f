"""The benchmarks run and report what they should; how fast is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT

LIMIT_S = 180  # torch takes its time to load in many processes on two cores
pytestmark = pytest.mark.timeout(LIMIT_S)

ROW = {
    "bench", "backend", "op", "bytes", "dtype", "world_size", "repeats", "time_us", "time_us_min",
    "time_us_max", "algbw_gbps", "busbw_gbps", "env",
}  # fmt: skip
QUICK = ("--sizes", "1K,64K", "--seconds", "0.05", "--min-repeats", "3")


def start(*command: str | Path, fails: bool = False) -> str:
    """Run a Python program; what it printed to stdout, or to stderr if it is to fail."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S - 10,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def check(row: dict[str, Any]) -> None:
    """What holds for every row, whatever it measures."""
    n = row["world_size"]
    assert set(row) == ROW
    assert row["time_us_min"] <= row["time_us"] <= row["time_us_max"]
    assert row["algbw_gbps"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3, rel=1e-2, abs=1e-6)
    assert row["busbw_gbps"] == pytest.approx(row["algbw_gbps"] * 2 * (n - 1) / n, rel=1e-2, abs=2e-6)
    assert {"cpu", "cores", "torch", "pyzmq", "commit", "transport"} <= set(row["env"])


def test_all_reduce_starts_its_own_workers(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ("benchmarks/allreduce.py", "-n", "2,3", "--transport", "tcp", "--json", results)
    out = start(*command, *QUICK)
    rows = json.loads(results.read_text())
    points = {(row["world_size"], row["bytes"], row["backend"]) for row in rows}
    assert points == {
        (n, size, backend) for n in (2, 3) for size in (1024, 65536) for backend in ("ringps-tcp", "gloo")
    }
    for row in rows:
        check(row)
        assert (row["env"]["transport"], row["repeats"] >= 3) == ("tcp", True)
    titles, *lines = out.splitlines()
    assert titles.split()[:3] == ["n", "size", "backend"]
    assert len(lines) == len(rows)


def test_all_reduce_runs_under_the_launcher() -> None:
    command = ("run", "-n", "2", "--transport", "tcp", "benchmarks/allreduce.py")
    out = start("-m", "ringps_launcher", *command, *QUICK)
    assert out.count("ringps-tcp") == 2
    assert out.count("[0]") == len(out.splitlines())


WRONG = """
import sys
sys.path.insert(0, "benchmarks")
import allreduce, torch.distributed
allreduce.BASELINE = "broken"
torch.distributed.all_reduce = lambda tensor: tensor.zero_()
allreduce.main()
"""


def test_a_wrong_sum_ends_the_benchmark(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    command = ("run", "-n", "2", "--transport", "tcp", script)
    assert "elements are wrong at 1024 bytes" in start("-m", "ringps_launcher", *command, *QUICK, fails=True)


def test_training_is_compared_and_its_memory_looked_at(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ["benchmarks/train.py", "-n", "2", "--transport", "tcp", "--models", "gpt-tiny,mlp-tiny"]
    command += ["--memory-model", "mlp-tiny", "--seconds", "0.05", "--min-repeats", "3"]
    out = start(*command, "--json", results)
    rows = json.loads(results.read_text())
    backends = ("none", "ddp", "ddp-view", "ringps-tcp")
    assert [(row["env"]["model"], row["backend"]) for row in rows] == [
        (model, backend) for model in ("gpt-tiny", "mlp-tiny") for backend in backends
    ]
    for row in rows:
        check(row)
        assert row["bytes"] == 4 * row["env"]["parameters"] > 100_000
        without = next(
            one for one in rows if (one["env"]["model"], one["backend"]) == (row["env"]["model"], "none")
        )
        if row is without:
            assert row["env"]["added_us"] is None
        else:
            assert row["env"]["added_us"] == pytest.approx(row["time_us"] - without["time_us"])
    looked_at = [row for row in rows if "extra_memory_gradients" in row["env"]]
    assert [(row["env"]["model"], row["backend"]) for row in looked_at] == [("mlp-tiny", "ringps-tcp")]
    assert len(out.splitlines()) == 1 + len(rows)


SPOILED = """
import sys
sys.path.insert(0, "benchmarks")
import models, ringps, torch, variants
ringps.init()
workload = models.WORKLOADS["mlp-tiny"]
torch.manual_seed(0)
one, other = (variants.make("ringps", workload, workload.build()) for _ in range(2))
one.losses, other.losses = [1.0, 2.0], [1.0, 2.00019]
variants.check_losses(one, other)
variants.check_equal(one)
try:
    other.losses[0] = 1.00011
    variants.check_losses(one, other)
except SystemExit as error:
    print("losses:", error)
if ringps.rank() == 1:
    with torch.no_grad():
        one.model[0].weight[3, 5] = -one.model[0].weight[3, 5]
variants.check_equal(one)
"""


def test_parameters_or_losses_that_differ_end_the_benchmark(tmp_path: Path) -> None:
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    command = (sys.executable, "-m", "ringps_launcher", "run", "-n", "2", "--transport", "tcp", str(script))
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S - 10, check=False
    )
    assert done.returncode == 1
    assert done.stdout.count("step 1: the loss is 1.0 with ringps, 1.00011 with ringps") == 2
    assert done.stderr.count("ringps: 1 parameters differ between the ranks") == 2


def test_recovery_is_measured(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ["benchmarks/recovery.py", "-n", "3", "--model", "gpt-mini", "--joiner-model", "gpt-mini"]
    command += ["--only", "losses,cut,join", "--repeats", "1", "--json", str(results)]
    out = start(*command)
    rows = {(row["op"], row["env"]["transport"]): row for row in json.loads(results.read_text())}
    losses = {"sigkill_gone", "sigkill_noticed", "sigkill_next_step", "sigstop_noticed", "sigstop_next_step"}
    losses |= {"sigterm_pause", "sigterm_exit"}
    joining = {f"join_{part}" for part in ("pause", "total", "start", "wait", "fetch", "first_step")}
    assert set(rows) == {
        *((op, "auto") for op in losses | joining),
        *((op, "tcp") for op in ("cut_noticed", "cut_next_step")),
    }
    for row in rows.values():
        check(row)
        assert (row["bench"], row["backend"], row["world_size"]) == ("recovery", "ringps", 3)
        if "above_step_ms" in row["env"]:
            assert row["env"]["above_step_ms"] < row["time_us"] / 1e3
    # A frozen process is noticed by its silence, which is at least as long as the last beat was old.
    assert (
        rows["sigstop_noticed", "auto"]["time_us"] > 1e6 > rows["sigkill_next_step", "auto"]["time_us"] / 10
    )
    parts = sum(rows[f"join_{part}", "auto"]["time_us"] for part in ("start", "wait", "fetch", "first_step"))
    assert parts == pytest.approx(rows["join_total", "auto"]["time_us"], rel=1e-3)
    assert rows["join_fetch", "auto"]["env"]["fetched_bytes"] > 2 * rows["join_fetch", "auto"]["bytes"]
    assert "sigstop_noticed: at most" in out


def test_what_a_commit_costs_is_measured(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ["benchmarks/recovery.py", "-n", "2", "--commit-model", "gpt-mini", "--only", "commit"]
    out = start(*command, "--steps", "10", "--json", str(results))
    rows = {row["op"]: row for row in json.loads(results.read_text())}
    parts = {"commit_hash", "commit_account", "commit_vote", "commit_parameters"}
    assert set(rows) == {"step_elastic", "step_fixed", *parts}
    for row in rows.values():
        check(row)
    for part in parts:
        assert 0 < rows[part]["env"]["share_of_cpu"] < 1
    assert "% of what a step takes of a core" in out


def test_goodput_is_compared(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ["benchmarks/goodput.py", "-n", "2", "--model", "gpt-mini", "--seconds", "5"]
    command += ["--quiet-seconds", "2", "--every", "2", "--json", str(results)]
    out = start(*command)
    rows = {(row["backend"], row["op"]): row for row in json.loads(results.read_text())}
    backends = ("ringps", "torchrun-ddp-gloo")
    assert set(rows) == {(backend, op) for backend in backends for op in ("with_kills", "without_kills")}
    for (backend, op), row in rows.items():
        check(row)
        facts = row["env"]
        assert facts["useful_samples"] == facts["curve"][-1][1]
        assert facts["samples_per_s"] == pytest.approx(facts["useful_samples"] / facts["seconds"], rel=0.05)
        assert (facts["kills"] > 0, facts["ended_after_s"]) == (op == "with_kills", None)
        if op == "without_kills" or backend == "ringps":
            assert facts["steps_lost"] == 0
            assert facts["useful_samples"] > 0
    assert len(out.splitlines()) == 1 + len(rows)


def test_checkpoints_are_compared(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = ["benchmarks/checkpoint.py", "-n", "2", "--megabytes", "1", "--directory", tmp_path]
    command += ["--seconds", "0.1", "--min-repeats", "2", "--model", "gpt-tiny", "--pairs", "1"]
    out = start(*command, "--json", results)
    rows = json.loads(results.read_text())
    for row in rows:
        check(row)
        assert (row["bench"], row["world_size"]) == ("checkpoint", 2)
    state = [(row["op"], row["backend"]) for row in rows if row["op"] != "train_step"]
    assert state == [
        *(("save_stall", backend) for backend in ("ringps", "torch.save", "copy")),
        *(("save_durable", backend) for backend in ("ringps", "torch.save", "write")),
        *(("restore", backend) for backend in ("ringps", "torch.save", "read")),
        *(("restore_into_model", backend) for backend in ("ringps", "torch.save")),
    ]
    by_place: dict[str, list[dict[str, Any]]] = {}
    for row in rows[len(state) :]:
        by_place.setdefault(row["env"]["place"], []).append(row)
    assert set(by_place) in ({"memory", "disk"}, {"disk"})  # where there is no room in memory
    for without, saving in by_place.values():
        assert (without["backend"], saving["backend"]) == ("ringps", "ringps-saving")
        assert saving["env"]["saves_asked"] == 2
        assert 1 - without["time_us"] / saving["time_us"] == pytest.approx(saving["env"]["lost"], abs=1e-3)
    assert "in plain copies" in out
    assert list(tmp_path.iterdir()) == [results]


def test_the_suite_knows_its_parts() -> None:
    assert "no benchmark nonsense" in start("benchmarks/suite.py", "--only", "nonsense", fails=True)
