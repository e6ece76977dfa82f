"""Training on a GPU gives what one process gives on the whole batch, by every way to exchange gradients."""

from __future__ import annotations

import pytest

from tests.gpu.card import COUNT
from tests.gpu.conftest import Jobs
from tests.gpu.training_worker import CASES

pytestmark = [pytest.mark.timeout(170), pytest.mark.usefixtures("need_gpu")]

WORKER = "training_worker.py"

each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize(("transport", "workers"), [("cuda_ipc", 2), ("tcp", 2), ("auto", 1)])
@each_case
def test_on_one_gpu(jobs: Jobs, transport: str, workers: int, case: str) -> None:
    jobs.check(WORKER, transport, workers, case)


@pytest.mark.skipif(COUNT < 2, reason="one GPU, and NCCL wants one for each member")
@each_case
def test_nccl(jobs: Jobs, case: str) -> None:
    jobs.check(WORKER, "nccl", min(COUNT, 4), case)
