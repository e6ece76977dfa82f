from __future__ import annotations

from typing import Any

import pytest

from ringps import worker_env
from ringps_launcher.job import Job
from ringps_launcher.plan import Placement, replacement, seats


def job(**changes: Any) -> Job:
    return Job(**{"program": "train.py", "workers": 2, **changes})


def placement(**changes: Any) -> Placement:
    values: dict[str, Any] = {
        "host": "node-b",
        "address": "10.0.0.2",
        "host_index": 1,
        "host_count": 2,
        "first_worker_id": 3,
        "world_size": 5,
        "master_address": "10.0.0.1",
        "master_port": 29400,
        "coordinator": "10.0.0.1:4700",
        "key_file": "/run/job.key",
    }
    return Placement(**{**values, **changes})


def test_command_of_a_script_and_of_a_module() -> None:
    assert job(arguments=("--lr", "3")).command("py") == ("py", "train.py", "--lr", "3")
    assert job(program="pkg.train", is_module=True).command("py") == ("py", "-m", "pkg.train")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"workers": 0}, "-n"),
        ({"grace_s": -1.0}, "--grace"),
        ({"grace_s": float("nan")}, "--grace"),
        ({"program": ""}, "script"),
        ({"min_workers": 0}, "--min-workers"),
        ({"min_workers": 3}, "--min-workers must be from 1 to the 2 of -n, not 3"),
        ({"max_restarts": -1}, "--max-restarts"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        job(**changes)


def test_workers_are_numbered_through_the_machines() -> None:
    got = [(s.worker_id, s.rank, s.local_rank) for s in seats(job(), placement(), environ={}, cores=8)]
    assert got == [(3, 3, 0), (4, 4, 1)]


def test_the_worker_reads_back_what_it_is_told() -> None:
    seat = seats(job(transport="tcp"), placement(), environ={}, cores=8)[1]
    assert worker_env.read(seat.environ) == worker_env.WorkerEnv(
        coordinator="10.0.0.1:4700",
        key_file="/run/job.key",
        worker_id=4,
        host="node-b",
        address="10.0.0.2",
        local_rank=1,
        local_world_size=2,
        transport="tcp",
    )


def test_torchrun_variables() -> None:
    environ = seats(job(), placement(), environ={"RANK": "9"}, cores=8)[1].environ
    assert {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_RANK": "4",
        "ROLE_WORLD_SIZE": "5",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
    }.items() <= environ.items()
    assert "TORCHELASTIC_USE_AGENT_STORE" not in environ


def test_a_replacement_has_the_seat_and_is_told_its_number() -> None:
    first = seats(job(max_restarts=7), placement(), environ={"HOME": "/home/me"}, cores=8)[1]
    assert (first.restart, first.environ["TORCHELASTIC_RESTART_COUNT"]) == (0, "0")
    assert first.environ["TORCHELASTIC_MAX_RESTARTS"] == "7"
    second = replacement(first, 2)
    assert (second.worker_id, second.rank, second.local_rank, second.restart) == (4, 4, 1, 2)
    assert second.environ == {**first.environ, "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(("cores", "threads"), [(8, "4"), (2, "1"), (1, "1")])
def test_cores_are_shared_out(cores: int, threads: str) -> None:
    assert seats(job(), placement(), environ={}, cores=cores)[0].environ["OMP_NUM_THREADS"] == threads


def test_the_user_s_own_settings_win_and_are_inherited() -> None:
    mine = {"OMP_NUM_THREADS": "7", "PYTHONUNBUFFERED": "", "HOME": "/home/me"}
    environ = seats(job(), placement(), environ=mine, cores=8)[0].environ
    assert mine.items() <= environ.items()


def test_a_later_start_of_the_ring_counts_on() -> None:
    for seat in seats(job(), placement(), environ={}, cores=8, restart=3):
        assert (seat.restart, seat.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "3")
    first = seats(job(), placement(), environ={}, cores=8)[0]
    assert (first.restart, first.environ["TORCHELASTIC_RESTART_COUNT"]) == (0, "0")


@pytest.mark.parametrize("directory", ["/mnt/ckpt", "s3://bucket/ckpt"])
def test_workers_are_told_where_to_save_checkpoints(directory: str) -> None:
    given = {"RINGPS_CHECKPOINT_DIR": "/elsewhere"}
    for seat in seats(job(checkpoint_dir=directory), placement(), environ=given, cores=8):
        assert worker_env.checkpoint_dir(seat.environ) == directory


def test_without_the_option_workers_inherit_where_to_save_checkpoints() -> None:
    def told(environ: dict[str, str]) -> str | None:
        return worker_env.checkpoint_dir(seats(job(), placement(), environ=environ, cores=8)[0].environ)

    assert told({}) is None
    assert told({"RINGPS_CHECKPOINT_DIR": ""}) is None
    assert told({"RINGPS_CHECKPOINT_DIR": "/inherited"}) == "/inherited"
