"""The GPU benchmark from end to end on a pretended GPU, and what it says of parts that fail."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launching import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # its scripts are no package

import gpu
import gpu_report
from gpu import Part


@pytest.mark.timeout(170)  # processes that load torch
def test_everything_is_rehearsed(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--rehearse", "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160, check=False, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = json.loads(results.read_text())
    points = {(row["op"], row["backend"], row["world_size"]) for row in rows if row["outcome"] == "rehearsal"}
    assert points == {
        *((op, "torch", 1) for op in ("copy on the device", "copy host to device", "copy device to host")),
        ("both copies at once", "torch", 1),
        *(("pack", backend, 1) for backend in ("ringps", "torch _foreach_copy_", "torch cat")),
        *((op, "ringps", 1) for op in ("unpack", "digest", "quantize", "dequantize and add")),
        *((f"fold {count}", backend, 1) for count in (2, 4, 8) for backend in ("ringps", "torch add")),
        *(("all_reduce", backend, 2) for backend in ("cuda_ipc, ringps.empty", "cuda_ipc")),
        *(("all_reduce", backend, 2) for backend in ("staged over zmq", "zmq on the host")),
        *(("train step, gpt-tiny", backend, 1) for backend in ("plain PyTorch", "ring of one")),
        ("sigkill to next step", "ringps, auto", 2),
    }
    for row in rows:
        assert row["env"]["gpu"] == "pretended"
        assert row["env"]["commit"]
        if row["outcome"] == "rehearsal":
            assert 0 < row["time_us_min"] <= row["time_us"] <= row["time_us_max"]
            assert row["bar"] is None or row["holds"] == (
                row["reached"] <= row["bar"] if row["unit"] else row["reached"] >= row["bar"]
            )
    absent = {(row["op"].split()[0], row["outcome"]): row["why"] for row in rows if not row["repeats"]}
    assert absent == {
        ("nccl", "n/a"): "it needs 2 GPUs, and here is 1",
        ("all_reduce", "n/a"): "it needs a GPU",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="there is no GPU that torch can use"):
        gpu.main()


def part(tmp_path: Path, text: str, limit_s: float = 30.0) -> Part:
    script = tmp_path / "part.py"
    script.write_text(f"import json, sys, time\nout = sys.argv[sys.argv.index('--json') + 1]\n{text}")
    return Part(name="some", script=str(script), limit_s=limit_s)


def test_a_part_that_fails_is_a_row_that_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, last = gpu.measure([part(tmp_path, "raise ValueError('so it is')")] * 2, 1, False, 60.0)
    assert first == last
    assert (first.op, first.outcome, first.why) == ("some", "failed", "exit code 1: ValueError: so it is")
    assert "gpu: some: FAILED: exit code 1: ValueError: so it is" in capfd.readouterr().err
    assert gpu_report.table([first]).lines == []
    assert gpu_report.missing([first]) == ["some , n = 1: failed: exit code 1: ValueError: so it is"]


def test_what_others_cannot_do_here_is_no_failure(tmp_path: Path) -> None:
    others = replace(part(tmp_path, "raise ValueError('not here')"), beside=True)
    (row,) = gpu.measure([others], 1, False, 60.0)
    assert (row.outcome, row.why) == ("n/a", "exit code 1: ValueError: not here")


def test_a_part_that_does_not_end_is_ended_and_keeps_what_it_had(tmp_path: Path) -> None:
    row = gpu_report.measured(
        "copy", backend="torch", size_bytes=8, dtype="bytes", times_s=[1e-6], rehearsal=False
    )
    gpu_report.write(tmp_path / "had.json", [row])
    text = f"open(out, 'w').write(open({str(tmp_path / 'had.json')!r}).read())\ntime.sleep(600)"
    had, failed = gpu.measure([part(tmp_path, text, limit_s=5.0)], 1, False, 60.0)
    assert had == row
    assert (failed.outcome, failed.why) == ("failed", "it did not end within 5 s")


def test_what_there_is_no_time_for_is_not_begun(tmp_path: Path) -> None:
    (row,) = gpu.measure([part(tmp_path, "raise SystemExit(7)")], 1, False, 1.0)
    assert (row.outcome, row.why) == ("failed", "no time was left for it")


def test_bars() -> None:
    share = gpu_report.measured(
        "fold 2",
        backend="ringps",
        size_bytes=300,
        dtype="float32",
        times_s=[3e-6, 2e-6, 4e-6],
        rehearsal=False,
        ceiling_s=2.7e-6,
        bar=0.9,
    )
    assert (share.time_us, share.ceiling_us, share.reached, share.holds) == (3.0, 2.7, 0.9, True)
    assert replace(share, reached=0.89).holds is False
    limit = gpu_report.measured(
        "sigkill",
        backend="ringps",
        size_bytes=1,
        dtype="float32",
        times_s=[0.5],
        rehearsal=False,
        bar=1.0,
        reached_s=0.4,
    )
    assert (limit.reached, limit.holds, replace(limit, reached=1.1).holds) == (0.4, True, False)
    assert replace(limit, bar=None).holds is None
    shown = gpu_report.table([share, limit, replace(share, reached=0.1)]).lines
    assert [line[-3:] for line in shown] == [
        ("0.9", "0.9", "yes"),
        ("0.4 s", "1 s", "yes"),
        ("0.1", "0.9", "NO"),
    ]


def test_results_are_named_by_gpu_and_day(tmp_path: Path) -> None:
    day = datetime.date(2031, 2, 3)
    path = gpu.results_file(tmp_path / "new", {"gpu": "NVIDIA H100 80GB HBM3"}, day)
    assert path == tmp_path / "new/gpu-nvidia-h100-80gb-hbm3-2031-02-03.json"
    assert path.parent.is_dir()
