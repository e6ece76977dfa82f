"""`ringps logs` against pods that really run: merged, marked, followed over restarts and replacements."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringps_launcher.cli import main
from ringps_launcher.kubernetes import logs, names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.following import Followed
from ringps_launcher.kubernetes.logs import Printer
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet.fleet import Fleet
from tests.k8s.reachable import Reachable
from tests.k8s.scripted import create
from tests.k8s.waiting import eventually

RUNS = "trap 'exit 0' TERM; sleep 1000 & wait"
TICKS = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done"


def pods(api: Cluster, name: str = "digits") -> dict[int, list[str]]:
    """Names of the workers' pods by worker id, the oldest first."""
    found: dict[int, list[str]] = {}
    listed = api.list("Pod", labels=names.selector(name, names.WORKER))
    for pod in sorted(listed, key=lambda pod: pod["metadata"]["creationTimestamp"]):
        index = int(pod["metadata"]["annotations"][names.INDEX_ANNOTATION])
        found.setdefault(index, []).append(pod["metadata"]["name"])
    return found


def is_over(api: Cluster, name: str = "digits") -> bool:
    status = api.get("Job", name).get("status") or {}
    return any(one["type"] in ("Complete", "Failed") for one in status.get("conditions") or ())


class Follower:
    """`ringps logs -f` on a thread."""

    def __init__(self, api: Cluster, **wanted: object) -> None:
        self.out = io.BytesIO()
        self.said: list[str] = []
        printer = Printer(self.out, coloured=False)
        self._followed = Followed(api, "digits", printer, say=self.said.append, **wanted)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._followed.follow)
        self._thread.start()

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().decode().splitlines()

    def ends(self, limit_s: float = 30.0) -> list[str]:
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), self.lines[-5:]
        return self.lines

    def stop(self) -> None:
        self._followed.close()
        self._thread.join(10)


@pytest.fixture
def follow(api: Cluster) -> Iterator[type[Follower]]:
    started: list[Follower] = []

    class Kept(Follower):
        def __init__(self, **wanted: object) -> None:
            super().__init__(api, **wanted)
            started.append(self)

    yield Kept  # type: ignore[misc]
    for follower in started:
        follower.stop()


def test_what_was_written_is_merged_in_order_and_marked_once(
    nodes: Fleet,
    api: Cluster,
    cluster: Reachable,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    nodes.add("n1")
    # As the launcher prints it: its worker's lines are marked, its own are not.
    script = (
        "i=$JOB_COMPLETION_INDEX; sleep 0.$((2*i)); echo \"[$i] first\"; sleep 0.6; echo 'ringps: own'; "
        "sleep 0.6; printf '[%s] \\303\\244 no end' $i"
    )
    create(api, "digits", script, coordinator=f"echo hello; {RUNS}")
    eventually(lambda: is_over(api), "the job is over")
    capfdbinary.readouterr()
    assert main(["logs", "-N", api.namespace, "digits"]) == 0
    out, err = capfdbinary.readouterr()
    assert out.decode().splitlines() == [
        "[0] first",
        "[1] first",
        "[0] ringps: own",
        "[1] ringps: own",
        "[0] ä no end",
        "[1] ä no end",
    ]
    assert err == b""
    assert main(["logs", "-N", api.namespace, "--rank", "1", "--tail", "1", "--coordinator", "digits"]) == 0
    assert capfdbinary.readouterr().out.decode().splitlines() == ["[coordinator] hello", "[1] ä no end"]
    assert main(["logs", "-N", api.namespace, "-f", "--rank", "0", "--since", "600", "digits"]) == 0
    assert len(capfdbinary.readouterr().out.splitlines()) == 3
    assert main(["logs", "-N", api.namespace, "--previous", "digits"]) == 1
    assert b"no earlier output" in capfdbinary.readouterr().err
    assert main(["logs", "-N", api.namespace, "--rank", "2", "digits"]) == 1
    assert b"--rank 2: the job's workers are 0 to 1" in capfdbinary.readouterr().err


def test_nothing_yet_says_why(api: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    create(api, "digits", RUNS, priority_class="gone")
    eventually(lambda: api.list("Event", fields="reason=FailedCreate"), "the pods are refused")
    assert logs.recorded(api, "digits", Printer(io.BytesIO(), coloured=False)) == 1
    assert "job digits has no output (it is pending): " in capfd.readouterr().err


def test_following_goes_on_in_a_pod_that_takes_the_place_of_another(
    nodes: Fleet, api: Cluster, follow: type[Follower]
) -> None:
    nodes.add("n1")
    create(api, "digits", f"echo began on $HOSTNAME; {RUNS}")
    follower = follow()
    eventually(lambda: len(follower.lines) == 2, "both have begun")
    assert sorted(line[:9] for line in follower.lines) == ["[0] began", "[1] began"]
    nodes.kill_pod(pods(api)[0][0])
    eventually(lambda: len(follower.lines) == 3, "the successor has begun")
    assert follower.lines[-1].startswith("[0] began")
    for own in pods(api).values():
        eventually(lambda: nodes.processes(own[-1]), "it runs")  # noqa: B023
        nodes.kill_process(own[-1], "sleep", 15)
    follower.ends()
    # The killed pod is still there: its output is the earlier one.
    out = io.BytesIO()
    assert logs.recorded(api, "digits", Printer(out, coloured=False), previous=True) == 0
    assert out.getvalue().decode().splitlines() == [line for line in follower.lines if line[1] == "0"][:1]


def test_a_pod_that_vanishes_does_not_end_the_others(
    nodes: Fleet, api: Cluster, follow: type[Follower]
) -> None:
    nodes.add("n1")
    create(api, "digits", f"echo began; {TICKS}")
    follower = follow()
    eventually(lambda: {line[1] for line in follower.lines if "tick" in line} == {"0", "1"}, "both tick")
    doomed = pods(api)[0][0]
    api.delete("Pod", doomed, grace_s=0)
    eventually(lambda: not [p for p in pods(api).get(0, []) if p == doomed] or True, "it is gone")
    count = len([line for line in follower.lines if line.startswith("[1]")])
    eventually(
        lambda: len([line for line in follower.lines if line.startswith("[1]")]) > count + 20,
        "the other ticks on",
    )
    api.delete("Job", "digits")
    follower.ends()


# Python 3.11 leaks a socket whose other end is reset between its connect and its TLS handshake.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <ssl.SSLSocket [^>]*proto=6, laddr=\('127.0.0.1', \d+\)>"
    ":pytest.PytestUnraisableExceptionWarning"
)
def test_an_api_server_that_restarts_costs_no_line_and_doubles_none(
    nodes: Fleet, api: Cluster, control_plane: ControlPlane, follow: type[Follower]
) -> None:
    nodes.add("n1")
    create(api, "digits", TICKS, workers=1)
    follower = follow()
    eventually(lambda: len(follower.lines) > 10, "it ticks")
    control_plane.stop_api()
    control_plane.start_api()
    count = len(follower.lines)
    eventually(lambda: len(follower.lines) > count + 40, "it ticks on")
    lines = follower.lines
    assert lines == [f"[0] tick {number}" for number in range(1, len(lines) + 1)]
    api.delete("Job", "digits")
    follower.ends()


def test_a_restarted_coordinator_has_earlier_output(
    nodes: Fleet, api: Cluster, follow: type[Follower]
) -> None:
    nodes.add("n1")
    create(api, "digits", RUNS, workers=1, coordinator=f"echo began; {TICKS}")
    follower = follow(coordinator=True)
    eventually(lambda: "[coordinator] tick 3" in follower.lines, "it ticks")
    (pod,) = api.list("Pod", labels=names.selector("digits", names.COORDINATOR))
    nodes.kill_pod(pod["metadata"]["name"])
    eventually(lambda: follower.lines.count("[coordinator] began") == 2, "it is started again")
    out = io.BytesIO()
    assert logs.recorded(api, "digits", Printer(out, coloured=False), coordinator=True, previous=True) == 0
    told = out.getvalue().decode().splitlines()
    assert told[:2] == ["[coordinator] began", "[coordinator] tick 1"]
    api.delete("Job", "digits")
    follower.ends()


def test_a_reader_that_goes_away_and_ctrl_c_are_quiet(
    nodes: Fleet, api: Cluster, cluster: Reachable, tmp_path: Path
) -> None:
    nodes.add("n1")
    create(api, "digits", TICKS, workers=1)
    eventually(lambda: pods(api), "there is a pod")
    command = [sys.executable, "-m", "ringps_launcher", "logs", "-N", api.namespace, "-f", "digits"]
    environ = {
        "KUBECONFIG": str(cluster.kubeconfig),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"[0] tick 1\n"
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"[0] tick 1\n"
        process.send_signal(2)
        assert process.wait(20) == 130
        assert process.stderr.read() == b""
