"""Jobs that use the ring, under `ringps run`: how they end, well and otherwise."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.launching import Finished, run, script, start

START = """
import torch, ringps
ringps.init()
"""


def fixed(workers: int) -> tuple[str, ...]:
    """Of a job whose ring ends with the first loss."""
    return ("run", "-n", str(workers), "--min-workers", str(workers))


def lines_of(finished: Finished, rank: int) -> str:
    """Everything that one rank printed to stderr."""
    return "\n".join(line for line in finished.err.splitlines() if line.startswith(f"[{rank}] "))


def test_a_job_that_ends_well(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        START
        + """
tensor = torch.full((300_000,), float(ringps.rank() + 1))
ringps.all_reduce(tensor)
assert tensor[0] == sum(range(1, ringps.world_size() + 1)) and ringps.worker_id() == ringps.rank()
assert (ringps.local_rank(), ringps.generation()) == (ringps.rank(), 1)
print("sum", tensor[0].item())
ringps.shutdown()
""",
    )
    events = tmp_path / "events.jsonl"
    for workers, total, extra in ((4, 10.0, ()), (2, 3.0, ("--encrypt-data",))):
        finished = run("run", "-n", str(workers), *extra, "--events", events, path)
        assert finished.code == 0, finished.err
        assert sorted(finished.out.splitlines()) == [f"[{rank}] sum {total}" for rank in range(workers)]
        assert f"{workers} workers on 1 host, transport shm (auto: " in finished.err
    recorded = [json.loads(line) for line in events.read_text().splitlines()]
    formed = [event for event in recorded if event["event"] == "generation"]
    assert [member["rank"] for member in formed[0]["members"]] == [0, 1, 2, 3]


def test_shutdown_may_be_left_to_the_end_of_the_script(tmp_path: Path) -> None:
    path = script(tmp_path, START + "ringps.barrier()\nprint('end')")
    finished = run("run", "-n", "3", path)
    assert (finished.code, finished.out.count("end")) == (0, 3), finished.err


KILLED = """
import time
tensor = torch.ones(1000)
ringps.all_reduce(tensor)
if RANK == 1:
    print("now", time.monotonic(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        ringps.all_reduce(tensor, "mean")
except ringps.PeerLostError as error:
    print("lost", error.rank, time.monotonic(), flush=True)
    raise
"""


def test_a_killed_worker_is_named_by_every_other_within_a_second(tmp_path: Path) -> None:
    finished = run(*fixed(4), script(tmp_path, START + KILLED))
    assert finished.code == 128 + signal.SIGKILL
    died_s = float(re.findall(r"\[1\] now ([\d.]+)", finished.out)[0])
    noticed = re.findall(r"\[([023])\] lost 1 ([\d.]+)", finished.out)
    assert sorted(rank for rank, _ in noticed) == ["0", "2", "3"]
    assert max(float(seen_s) for _, seen_s in noticed) - died_s < 1.0
    for rank in (0, 2, 3):
        assert re.search(
            r"PeerLostError: rank 1 \(worker 1 on .*\) lost: .* signal 9", lines_of(finished, rank)
        )
    assert re.match(r"ringps: rank 1 \(worker 1 on .*\) failed: .* signal 9 \(SIGKILL\)", finished.last)


def test_a_frozen_worker_is_lost_when_its_heartbeats_stop(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        START
        + """
ringps.barrier()
if RANK == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
ringps.barrier()
""",
    )
    # A stopped process does not hear SIGTERM either, so the launcher needs its grace for that one.
    environ = {"RINGPS_HEARTBEAT_TIMEOUT_S": "1.5", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1"}
    finished = run(*fixed(3), "--grace", "1", path, environ=environ)
    assert finished.code != 0
    for rank in (0, 1):
        assert re.search(r"PeerLostError: rank 2 .* no heartbeat .*1\.5 s", lines_of(finished, rank)), (
            finished.err
        )
    assert "rank 2 (worker 2 on" in finished.last


def test_an_exception_on_one_rank_ends_all_and_is_the_one_reported(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        START
        + """
if RANK == 2:
    raise KeyError("no such column")
ringps.barrier()
""",
    )
    finished = run(*fixed(3), path)
    assert finished.code == 1
    assert "KeyError: 'no such column'" in lines_of(finished, 2)
    assert "rank 2 (worker 2 on" in finished.last
    for rank in (0, 1):
        assert "PeerLostError: rank 2" in lines_of(finished, rank)


def test_a_rank_that_ends_early_is_named_by_those_who_need_it(tmp_path: Path) -> None:
    path = script(tmp_path, START + "ringps.barrier()\nif RANK != 1:\n    ringps.barrier()")
    finished = run(*fixed(3), path)
    assert finished.code == 1
    for rank in (0, 2):
        assert re.search(
            r"PeerLeftError: rank 1 .* shut down after 1 collectives, this rank called one more: barrier",
            lines_of(finished, rank),
        )


def test_ranks_that_disagree_are_told_who_called_what(tmp_path: Path) -> None:
    path = script(tmp_path, START + "ringps.all_reduce(torch.ones(3 if RANK == 1 else 4))")
    finished = run(*fixed(3), path)
    assert finished.code == 1
    for rank in range(3):
        text = lines_of(finished, rank)
        assert "CollectiveMismatchError: the ranks disagree on collective number 1" in text
        assert re.search(r"rank 1 \(worker 1 on .*\): all_reduce\(sum, float32\[3\]\)", text)
        assert re.search(r"rank [02] \(worker [02] on .*\): all_reduce\(sum, float32\[4\]\)", text)


def test_a_rank_that_calls_nothing_is_named_when_the_others_time_out(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        START
        + """
if RANK == 0:
    signal.pause()
ringps.barrier()
""",
    )
    finished = run(*fixed(3), path, environ={"RINGPS_OP_TIMEOUT_S": "0.5"})
    assert finished.code == 1
    assert "CollectiveTimeoutError" in finished.err
    assert re.search(r"rank 0 \(worker 0 on .*\): no collective called yet", finished.err)


def test_two_ranks_with_different_models_are_told_the_parameter(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        START
        + """
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3 if RANK == 1 else 2))
ringps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
""",
    )
    finished = run(*fixed(2), path)
    assert finished.code == 1
    for rank in range(2):
        error = next(line for line in lines_of(finished, rank).splitlines() if "LayoutMismatchError:" in line)
        assert "1.weight" in error


def test_training_is_as_fast_to_stop_as_to_start(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a job with collectives under way."""
    path = script(
        tmp_path,
        START
        + """
print("training", flush=True)
while True:
    ringps.all_reduce(torch.ones(2_000_000), "mean")
""",
    )
    with start("run", "-n", "4", path) as command:
        command.expect_all(*(f"[{rank}] training" for rank in range(4)))
        command.send(signal.SIGINT)
        assert command.finish().code == 130


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_is_not_in_the_ring(tmp_path: Path, count: int) -> None:
    path = script(
        tmp_path,
        START
        + """
ringps.barrier()
pid = os.fork()
if pid == 0:
    try:
        ringps.rank()
    except ringps.ClosedError:
        sys.exit(0)  # runs the interpreter's exit functions
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
ringps.barrier()
""",
    )
    finished = run("run", "-n", str(count), path, environ={"PYTHONWARNINGS": "ignore::DeprecationWarning"})
    assert finished.code == 0, finished.err
