"""Every way to carry out collectives on a GPU, among processes that share one, or have one each."""

from __future__ import annotations

import pytest

from tests.gpu.card import COUNT
from tests.gpu.collectives_worker import CASES
from tests.gpu.conftest import Jobs

pytestmark = [pytest.mark.timeout(170), pytest.mark.usefixtures("need_gpu")]

WORKER = "collectives_worker.py"
ASKED = {"cuda_ipc": 3, "tcp": 2, "zmq": 2, "shm": 3}
"""With how many workers."""

each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("transport", ASKED)
@each_case
def test_on_one_gpu(jobs: Jobs, transport: str, case: str) -> None:
    said = jobs.check(WORKER, transport, ASKED[transport], case)
    way = (
        "cuda_ipc (as asked)"
        if transport == "cuda_ipc"
        else "staged (as asked: through the host's memory, over"
    )
    assert f"GPU tensors: {way}" in said


@each_case
def test_a_ring_of_one(jobs: Jobs, case: str) -> None:
    jobs.check(WORKER, "auto", 1, case)


@each_case
def test_what_is_chosen_for_a_gpu_that_workers_share(jobs: Jobs, case: str) -> None:
    said = jobs.check(WORKER, "auto", 2, case)
    assert "GPU tensors: cuda_ipc (auto: all workers are on one host, and no NCCL:" in said


@pytest.mark.skipif(COUNT < 2, reason="one GPU, and NCCL wants one for each member")
@each_case
def test_nccl(jobs: Jobs, case: str) -> None:
    said = jobs.check(WORKER, "nccl", min(COUNT, 4), case)
    assert "GPU tensors: nccl (as asked)" in said
