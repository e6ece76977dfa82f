"""`ringps run` on one machine: what a user sees of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ringps_launcher import cli
from tests.launching import COMMAND, MEMBER, run, script, start


def test_workers_run_with_their_arguments_and_prefixed_output(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        print("out", sys.argv[1:])
        print("err", file=sys.stderr)
        """,
    )
    done = run("run", "-n", "2", program, "--lr", "3", "-n", "9", "--", "x")
    arguments = "['--lr', '3', '-n', '9', '--', 'x']"
    assert done.code == 0
    assert sorted(done.out.splitlines()) == [f"[0] out {arguments}", f"[1] out {arguments}"]
    assert sorted(done.err.splitlines()) == ["[0] err", "[1] err"]


def test_a_module_is_run_as_python_does(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mod.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    done = run("run", "-n", "1", "-m", "pkg.mod", "a", cwd=tmp_path)
    assert (done.code, done.out) == (0, "[0] __main__ pkg ['a']\n")


def test_the_environment_of_the_workers(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        from ringps import worker_env
        me = worker_env.read()
        modes = [oct(os.stat(path).st_mode & 0o777) for path in (me.key_file, os.path.dirname(me.key_file))]
        print(me.worker_id, me.local_rank, me.local_world_size, me.transport, me.address, *modes)
        print(sys.stdin.read(), os.getpgid(0) == os.getpid())
        """,
    )
    done = run("run", "-n", "2", "--transport", "tcp", program)
    assert sorted(done.out.splitlines()) == [
        "[0]  True",
        "[0] 0 0 2 tcp 127.0.0.1 0o600 0o700",
        "[1]  True",
        "[1] 1 1 2 tcp 127.0.0.1 0o600 0o700",
    ]


def test_torch_distributed_starts_from_the_environment(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(value)
        print("sum", value.item(), "of", dist.get_world_size())
        dist.destroy_process_group()
        """,
    )
    done = run("run", "-n", "2", program)
    assert done.code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] sum 3.0 of 2", "[1] sum 3.0 of 2"]


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("sys.exit(7)", 7, "process exited with code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process killed by signal 9 (SIGKILL)"),
        ("os.abort()", 134, "process killed by signal 6 (SIGABRT)"),
    ],
)
def test_the_exit_code_is_that_of_the_worker_that_failed(
    tmp_path: Path, ending: str, code: int, reason: str
) -> None:
    program = script(tmp_path, f"if RANK == 1: {ending}")
    done = run("run", "-n", "2", "--host", "node-a", program)
    assert done.code == code
    assert done.last == (
        f"ringps: rank 1 (worker 1 on node-a) failed: {reason}; "
        "its output is above; --log-dir DIR keeps it in a file"
    )


def test_an_import_error_shows_the_worker_s_own_traceback(tmp_path: Path) -> None:
    program = script(tmp_path, "import there_is_no_such_module")
    done = run("run", "-n", "1", program)
    assert done.code == 1
    assert "[0] ModuleNotFoundError: No module named 'there_is_no_such_module'\n" in done.err
    assert done.last.startswith("ringps: rank 0 (worker 0 on ")
    assert done.err.count("Traceback") == 1


def test_lines_stay_whole_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        for i in range(300):
            for part in (b"a" * 50, b"\\xff", b"b" * 50, b"\\n"):
                os.write(1, part)
        os.write(1, b"no end \\xfe")
        """,
    )
    done = run("run", "-n", "2", "--log-dir", tmp_path / "logs", program)
    assert done.code == 0
    for rank in (0, 1):
        raw = (tmp_path / f"logs/rank-{rank}.log").read_bytes()
        assert raw == (b"a" * 50 + b"\xff" + b"b" * 50 + b"\n") * 300 + b"no end \xfe"
        mine = [line for line in done.out.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] " + "a" * 50 + "\udcff" + "b" * 50] * 300 + [f"[{rank}] no end \udcfe"]
    assert done.out.count("\n") == 602


def test_stdout_and_stderr_to_the_same_pipe_do_not_tear_each_other(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        for i in range(2000):
            os.write(1 + (i + RANK) % 2, b"x" * 100 + b"\\n")
        """,
    )
    with subprocess.Popen(
        [*COMMAND, "run", "-n", "2", str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as command:
        assert command.stdout is not None
        lines = command.stdout.read().decode().splitlines()
    assert command.returncode == 0
    assert sorted(lines) == ["[0] " + "x" * 100] * 2000 + ["[1] " + "x" * 100] * 2000


def test_a_very_long_line_comes_in_pieces_and_whole_in_the_log(tmp_path: Path) -> None:
    size = 1_000_000
    program = script(tmp_path, f"sys.stdout.write('x' * {size})")
    done = run("run", "-n", "1", "--log-dir", tmp_path, program)
    assert done.out.replace("[0] ", "").replace("\n", "") == "x" * size
    assert max(map(len, done.out.splitlines())) <= 64 * 1024 + len("[0] ")
    assert (tmp_path / "rank-0.log").stat().st_size == size


def test_the_last_line_names_the_log(tmp_path: Path) -> None:
    program = script(tmp_path, "print('bye'); sys.exit(RANK)")
    done = run("run", "-n", "2", "--log-dir", tmp_path / "a/b", program)
    assert done.last.endswith(f"; its log is {tmp_path}/a/b/rank-1.log")
    assert (tmp_path / "a/b/rank-1.log").read_text() == "bye\n"


def test_a_closed_pipe_ends_the_job(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        while True:
            print("more")
        """,
    )
    with start("run", "-n", "2", program) as command:
        command.expect("more")
        command.out.close()
        command.process.stdout = None
        done = command.finish()
    assert done.code == 128 + signal.SIGPIPE
    assert "Traceback" not in done.err.replace("[0]", "").replace("[1]", "")


def test_a_reader_that_stands_still_does_not_hold_up_the_launcher(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        while True:
            print("x" * 10_000)
        """,
    )
    with start("run", "-n", "2", "--grace", "2", program) as command:
        command.expect("x")
        command.send(signal.SIGTERM)
        command.process.wait(timeout=40)  # reads nothing
        assert command.process.returncode == 143


def test_workers_are_told_where_to_save_checkpoints(tmp_path: Path) -> None:
    program = script(tmp_path, "print(os.environ.get('RINGPS_CHECKPOINT_DIR'))")
    for given, told in (("ckpt", str(tmp_path / "ckpt")), ("s3://bucket/ckpt", "s3://bucket/ckpt")):
        done = run("run", "-n", "1", "--checkpoint-dir", given, program, cwd=tmp_path)
        assert (done.code, done.out) == (0, f"[0] {told}\n")


def test_events(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "torn')
    program = script(tmp_path, "sys.exit(5 * RANK)")
    done = run("run", "-n", "2", "--events", events, program)
    assert done.code == 5
    torn, *lines = events.read_text().splitlines()
    assert torn == '{"event": "torn'
    written = [json.loads(line) for line in lines]
    started = [event for event in written if event["event"] == "worker_started"]
    assert [event["rank"] for event in started] == [0, 1]
    assert all(isinstance(event["t"], float) and event["pid"] for event in started)
    exited = {event["rank"]: event for event in written if event["event"] == "worker_exited"}
    assert (exited[0]["code"], exited[1]["code"]) == (0, 5)
    assert exited[1]["reason"] == "process exited with code 5"


def test_events_of_the_ring(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    fixed = ("-n", "2", "--min-workers", "2")
    with start("run", *fixed, "--events", events, script(tmp_path, MEMBER)) as command:
        _, victim = command.expect_all("[0] pid", "[1] pid")
        os.kill(int(victim.split()[-1]), signal.SIGKILL)
        assert command.finish().code == 137
    written = [json.loads(line) for line in events.read_text().splitlines()]
    [generation] = [event for event in written if event["event"] == "generation"]
    assert [member["rank"] for member in generation["members"]] == [0, 1]
    [lost] = [event for event in written if event["event"] == "worker_lost"]
    assert (lost["rank"], lost["reason"]) == (1, "process killed by signal 9 (SIGKILL)")


def test_what_a_worker_leaves_in_its_group_is_killed(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        child = subprocess.Popen(["sleep", "1000"])
        print("child", child.pid)
        os._exit(0)
        """,
    )
    done = run("run", "-n", "1", program)
    assert done.code == 0
    # The fixture sees whether the child is gone.


def unreadable_key(directory: Path) -> Path:
    path = directory / "open.key"
    path.write_text("secret")
    path.chmod(stat.S_IRUSR | stat.S_IRGRP)
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "COMMAND"),
        (["walk"], 2, "walk"),
        (["run", "-n", "2"], 2, "SCRIPT"),
        (["run", "SCRIPT"], 2, "-n"),
        (["run", "-n", "2", "absent.py"], 2, "there is no script absent.py"),
        (["run", "-n", "2", "."], 2, ". is a directory"),
        (["run", "-n", "0", "SCRIPT"], 2, "at least 1"),
        (["run", "-n", "-3", "SCRIPT"], 2, "at least 1"),
        (["run", "-n", "two", "SCRIPT"], 2, "'two' is not a whole number"),
        (["run", "-n", "1", "--grace", "-1", "SCRIPT"], 2, "--grace"),
        (["run", "-n", "1", "--transport", "rdma", "SCRIPT"], 2, "choose from 'auto', 'shm', 'tcp', 'zmq'"),
        (["run", "-n", "2", "--min-workers", "3", "SCRIPT"], 2, "--min-workers 3 is above -n 2"),
        (["run", "-n", "2", "--min-workers", "0", "SCRIPT"], 2, "at least 1"),
        (
            [*["run", "-n", "1", "--min-workers", "1", "--join", "127.0.0.1:1", "--key-file", "k"], "SCRIPT"],
            2,
            "--min-workers goes to `ringps coordinator`",
        ),
        (["run", "-n", "2", "--max-restarts", "-1", "SCRIPT"], 2, "--max-restarts"),
        (["run", "-n", "2", "--max-restarts", "few", "SCRIPT"], 2, "'few' is not a whole number"),
        (["run", "-n", "2", "--checkpoint-dir", "", "SCRIPT"], 2, "--checkpoint-dir"),
        (["coordinator", "--bind", "127.0.0.1:0", "--max-restarts", "-1"], 2, "--max-restarts"),
        (["run", "-n", "1", "--join", "nowhere", "--key-file", "k", "SCRIPT"], 2, "HOST:PORT"),
        (["run", "-n", "1", "--join", "127.0.0.1:1", "SCRIPT"], 2, "go together"),
        (["run", "-n", "1", "--key-file", "k", "SCRIPT"], 2, "go together"),
        (["run", "-n", "1", "--address", "here", "SCRIPT"], 2, "not an IP address"),
        (["run", "-n", "1000000", "SCRIPT"], 1, "world_size"),
        (["run", "-n", "1", "--join", "127.0.0.1:1", "--key-file", "k", "SCRIPT"], 1, "key file k"),
        (["run", "-n", "1", "--join", "127.0.0.1:1", "--key-file", "OPEN", "SCRIPT"], 1, "chmod 600"),
        (["run", "-n", "1", "--log-dir", "SCRIPT/logs", "SCRIPT"], 1, "log directory"),
        (["run", "-n", "1", "--events", "absent/events", "SCRIPT"], 1, "absent/events"),
        (["coordinator", "--bind", "127.0.0.1:0"], 2, "--key-file"),
        (
            [
                "coordinator",
                "--bind",
                "127.0.0.1:0",
                "--key-file",
                "absent/k",
                "-n",
                "1",
                "--min-workers",
                "2",
            ],
            2,
            "--min-workers 2 is above -n 1",
        ),
        (["coordinator", "--bind", "127.0.0.1:0", "--key-file", "OPEN"], 1, "chmod 600"),
        (["coordinator", "--bind", "127.0.0.1:0", "--key-file", "absent/k"], 1, "absent/k"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    names = {"SCRIPT": str(script(tmp_path, "print('ran')")), "OPEN": str(unreadable_key(tmp_path))}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    out, err = capfd.readouterr()
    assert err.startswith("ringps: ")
    assert err.count("\n") == 1, err
    assert complaint in err
    assert out == ""


def test_a_bad_setting_names_its_variable(tmp_path: Path) -> None:
    done = run("run", "-n", "1", script(tmp_path, ""), environ={"RINGPS_CONNECT_TIMEOUT_S": "soon"})
    assert (done.code, done.err) == (1, "ringps: RINGPS_CONNECT_TIMEOUT_S must be a number, not 'soon'\n")


def test_version_and_help() -> None:
    assert run("--version").out.startswith("ringps ")
    done = run("run", "--help")
    assert done.code == 0 and "--log-dir" in done.out
    meaning = "a fixed ring: the first loss ends the job"
    for command in ("run", "coordinator"):
        text = " ".join(run(command, "--help").out.split())
        assert "--min-workers M" in text and meaning in text
        assert "--max-restarts R" in text and "the whole ring is started again" in text
    text = " ".join(done.out.split())
    assert "--checkpoint-dir DIR where ringps.Checkpointer saves, unless the script names" in text


def test_the_launcher_does_not_load_torch() -> None:
    modules = "ringps_launcher.cli, ringps_launcher.supervise, ringps_launcher.coordinate"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0
