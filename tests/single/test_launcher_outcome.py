from __future__ import annotations

from ringps_launcher.outcome import (
    Failure,
    Loss,
    Outcome,
    Saved,
    describe_exit,
    describe_stop,
    exit_code,
    failed,
    last_line,
    stopped_at,
)

REMOTE = Failure(worker_id=0, rank=0, host="node-a", code=137, reason="process killed by signal 9")


def last(outcome: Outcome) -> str | None:
    return last_line(outcome, log=None, local=False)


def test_exit_codes_and_reasons() -> None:
    assert [exit_code(status) for status in (0, 3, -9)] == [0, 3, 137]
    assert describe_exit(3) == "process exited with code 3"
    assert describe_exit(-9) == "process killed by signal 9 (SIGKILL)"
    assert describe_exit(-40) == "process killed by signal 40"
    assert describe_stop(2) == "got SIGINT"
    assert "reads" in describe_stop(13)


def test_the_last_line_says_who_why_and_where() -> None:
    ended = Outcome(code=137, failure=REMOTE)
    line = last_line(ended, log=None, local=False)
    assert line is not None
    assert line.startswith("rank 0 (worker 0 on node-a) failed: process killed by signal 9; ")
    assert line.endswith("launcher on node-a")
    assert "--log-dir" in (last_line(ended, log=None, local=True) or "")
    assert "logs/rank-0.log" in (last_line(ended, log="logs/rank-0.log", local=True) or "")


def test_success_without_losses_needs_no_words() -> None:
    assert last(Outcome(code=0)) is None
    assert last(Outcome(code=130, signal=2)) == "stopped: got SIGINT"


def test_success_after_losses_names_them() -> None:
    a, b = Loss(worker_id=2, reason="process killed by signal 9"), Loss(worker_id=1, reason="code 3")
    assert last(Outcome(code=0, losses=(a,), replaced=1)) == (
        "done; 1 worker was lost on the way (worker 2: process killed by signal 9) and 1 replaced"
    )
    assert last(Outcome(code=0, losses=(a, b))) == (
        "done; 2 workers were lost on the way (worker 2: process killed by signal 9; worker 1: code 3) "
        "and none replaced"
    )
    many = last(Outcome(code=0, losses=(b,) * 9, replaced=9)) or ""
    assert many.count("worker 1") == 5
    assert many.endswith("; and 4 more) and 9 replaced")


def test_a_job_that_stopped_at_a_checkpoint_says_where_it_goes_on() -> None:
    saved = Saved(step=300, directory="s3://bucket/ckpt")
    line = (
        "stopped after step 300, which is saved in s3://bucket/ckpt; "
        "the same command goes on from there (exit code 75)"
    )
    assert stopped_at(saved) == line
    assert last(Outcome(code=75, suspended=True, saved=saved)) == line
    assert last(Outcome(code=75, suspended=True, saved=saved, signal=15)) == line
    assert last(Outcome(code=75, suspended=True)) == (
        "stopped at a checkpoint; the same command goes on from there (exit code 75)"
    )


def test_why_the_ring_is_not_started_again_stands_before_the_log() -> None:
    outlook = "the restarts are used up (--max-restarts 3)"
    line = last_line(Outcome(code=137, failure=REMOTE), log="a.log", local=True, outlook=outlook)
    assert line == f"{failed(REMOTE)}; {outlook}; its log is a.log"
