"""Tests on a GPU. They are skipped where there is none, unless RINGPS_TEST_NO_SKIP=1: then they fail.

With RINGPS_TEST_PRETEND=1 those of collectives, training and recovery run on pretended GPUs instead:

    RINGPS_TEST_PRETEND=1 pytest tests/gpu -k "collectives or training or recovery"
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.gpu.card import PRETEND
from tests.launching import ROOT, start
from tests.support import require

Outcomes = dict[str, list[str]]
"""What each rank says of a case: "passed", "cannot be pretended", or how it failed."""

LIMIT_S = 150.0
"""For a job: kernels may be yet to be compiled. Below the tests' own limit, so that its output is shown."""


def run_for(*arguments: str | Path, environ: Mapping[str, str]) -> str:
    """Run `ringps ARGUMENTS` to its end, or to `LIMIT_S`: how it ended, and all that it printed."""
    with start(*arguments, environ=environ) as command:
        try:
            out, err = command.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as late:
            parts = [raw if isinstance(raw, str) else raw.decode(errors="replace") for raw in _printed(late)]
            return "\n".join([f"it did not end within {LIMIT_S:g} s", *parts])
        return f"exit code {command.process.returncode}\n{out}\n{err}"


def _printed(late: subprocess.TimeoutExpired) -> list[str | bytes]:
    return [raw for raw in (late.stdout, late.stderr) if raw]


class Jobs:
    """Jobs whose workers run one case after the other; each job runs once, whatever asks for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[tuple[str, ...], tuple[Outcomes, str]] = {}

    def run(self, script: str, transport: str, workers: int) -> tuple[Outcomes, str]:
        """What came of its cases, and what it printed."""
        key = (script, transport, str(workers))
        if key not in self._found:
            directory = self._directory / "-".join((Path(script).stem, transport, str(workers)))
            directory.mkdir()
            ring = ("-n", str(workers), "--min-workers", str(workers), "--transport", transport)
            environ = {"RINGPS_OP_TIMEOUT_S": "60", "RINGPS_DOUBLING_BYTES": "0"}
            said = run_for("run", *ring, ROOT / "tests/gpu" / script, directory, environ=environ)
            outcomes: Outcomes = {}
            for rank in range(workers):
                path = directory / f"rank-{rank}.jsonl"
                for line in path.read_text().splitlines() if path.exists() else ():
                    name, told = json.loads(line)
                    outcomes.setdefault(name, []).append(told)
            self._found[key] = outcomes, said
        return self._found[key]

    def check(self, script: str, transport: str, workers: int, case: str) -> str:
        """That a case passed on all ranks; what the job printed."""
        outcomes, said = self.run(script, transport, workers)
        told = outcomes.get(case, [])
        if "cannot be pretended" in told and PRETEND:
            pytest.skip("cannot be pretended")
        assert told == ["passed"] * workers, f"{case}: {told}\n{said[-5000:]}"
        return said


@pytest.fixture
def need_gpu() -> None:
    """A GPU, or one that is pretended."""
    require(PRETEND or torch.cuda.is_available(), "there is no GPU")


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))
