"""The examples, as a newcomer runs them: alone and under `ringps run`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

LIMIT_S = 180  # they train, and torch takes its time to load in four processes on two cores
pytestmark = pytest.mark.timeout(LIMIT_S)

DIGITS = ("examples/digits.py", "--epochs", "5", "--batch", "32", "--lr", "4e-3", "--target", "0.95")
GPT = (
    "examples/gpt.py", "--steps", "40", "--batch", "8", "--context", "32", "--layers", "2", "--width", "64",
    "--lr", "1e-2", "--corpus-bytes", "500000", "--write", "30",
)  # fmt: skip


@pytest.fixture(autouse=True)
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes a directory for compiled code, and nobody removes it: not in what we look through."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def start(workers: int | None, *command: str, code: int = 0) -> str:
    """Run an example, alone or with workers; what it printed to stdout."""
    launcher = [] if workers is None else ["-m", "ringps_launcher", "run", "-n", str(workers)]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S - 10,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"(?:epoch|step) .* loss ([0-9.]+) .* samples/s", out)]


@pytest.mark.parametrize("workers", [None, 4])
def test_digits_are_learned(workers: int | None) -> None:
    out = start(workers, *DIGITS)
    seen = losses(out)
    assert len(seen) == 5
    assert seen[-1] < 0.3 * seen[0]
    assert f"trained on {workers or 1} workers" in out
    assert re.search(r"test accuracy 9[5-9]\.\d\d% on 360 unseen digits, 95% wanted: ok", out)
    assert "parameters bitwise equal on all ranks: ok" in out


def test_digits_fail_if_the_target_is_missed() -> None:
    out = start(2, "examples/digits.py", "--epochs", "1", "--target", "1.01", code=1)
    assert "101% wanted: FAILED" in out


def test_gpt_learns_the_same_on_any_number_of_workers() -> None:
    curves = []
    for workers in (None, 2):
        out = start(workers, *GPT)
        curves.append(losses(out))
        assert curves[-1][-1] < curves[-1][0] - 0.5
        assert "validation loss" in out
        assert "def " in out
    assert curves[1] == pytest.approx(curves[0], abs=0.02)  # sums are rounded in another order
