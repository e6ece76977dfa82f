"""Whose output `ringps logs` reads, how lines are marked and written, and what `doctor` says of versions."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from ringps_launcher.kubernetes import checks, findings
from ringps_launcher.kubernetes.logs import Printer
from ringps_launcher.kubernetes.sources import COORDINATOR_ID, Source, chosen, read_line, unprefixed
from tests.kubernetes_objects import NAME, NOW, Object, coordinator, worker


def names_of(sources: list[Source]) -> list[tuple[str, bool]]:
    return [(source.pod, source.previous) for source in sources]


def restarted(pod: Object, count: int) -> Object:
    pod["status"]["containerStatuses"][0]["restartCount"] = count
    return pod


ENDED = {"terminated": {"exitCode": 137}}
WAITS = {"waiting": {"reason": "ContainerCreating"}}


def test_the_newest_pod_that_has_started_is_read() -> None:
    pods = [
        worker(1, suffix="new", age_s=10, state=WAITS),
        worker(1, "Failed", suffix="old", age_s=50, state=ENDED),
        worker(0, suffix="only"),
        worker(0, "Failed", suffix="past", age_s=90, state=ENDED),
        worker(2, "Pending", node=""),
        coordinator(),
        {"metadata": {"name": "stranger"}},
    ]
    assert names_of(chosen(pods, (), coordinator=False)) == [
        (f"{NAME}-0-only", False),
        (f"{NAME}-1-old", False),
    ]
    assert names_of(chosen(pods, {1}, coordinator=True)) == [
        (f"{NAME}-coordinator-xxxxx", False),
        (f"{NAME}-1-old", False),
    ]


def test_what_came_before_is_the_container_else_the_pod() -> None:
    pods = [
        worker(0, suffix="now", age_s=10),
        worker(0, "Failed", suffix="b", age_s=50, state=ENDED),
        worker(0, "Failed", suffix="a", age_s=90, state=ENDED),
        restarted(worker(1), 2),
        worker(2),
        restarted(coordinator(), 1),
    ]
    found = chosen(pods, (), coordinator=True, previous=True)
    assert names_of(found) == [
        (f"{NAME}-coordinator-xxxxx", True),
        (f"{NAME}-0-b", False),
        (f"{NAME}-1-aaaaa", True),
    ]
    assert [source.instance for source in found] == [0, 0, 1]


def test_a_container_that_waits_to_be_started_again_still_has_its_output() -> None:
    pod = coordinator(
        state={"waiting": {"reason": "CrashLoopBackOff"}}, restarts=3, terminated={"exitCode": 1}
    )
    (source,) = chosen([pod], (), coordinator=True)
    assert (source.worker_id, source.instance, source.who) == (COORDINATOR_ID, 3, "coordinator")


@pytest.mark.parametrize(
    ("line", "stamp", "rest"),
    [
        (b"2026-11-28T17:49:08.000000001Z text", 1795888148000000001, b"text"),
        (b"2026-11-28T17:49:08.5Z a b", 1795888148500000000, b"a b"),
        (b"2026-11-28T19:49:08.5+02:00 x", 1795888148500000000, b"x"),
        (b"2026-11-28T12:19:08-05:30 x", 1795888148000000000, b"x"),
        (b"2026-11-28T17:49:08Z ", 1795888148000000000, b""),
        (b"no time here", None, b"no time here"),
        (b"", None, b""),
    ],
)
def test_timestamps_of_lines(line: bytes, stamp: int | None, rest: bytes) -> None:
    assert read_line(line) == (stamp, rest)


@pytest.mark.parametrize(
    ("line", "worker_id", "bare"),
    [
        (b"[3] loss 0.5", 3, b"loss 0.5"),
        (b"[3] [3] said twice", 3, b"[3] said twice"),
        (b"[4] of somebody else", 3, b"[4] of somebody else"),
        (b"ringps: own line\r", 3, b"ringps: own line"),
        (b"[-1] x", COORDINATOR_ID, b"[-1] x"),
    ],
)
def test_the_mark_of_the_launcher_in_the_pod_is_replaced_by_ours(
    line: bytes, worker_id: int, bare: bytes
) -> None:
    assert unprefixed(line, worker_id) == bare


class Narrow(io.BytesIO):
    """Takes a few bytes at a time, and none after `room`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def write(self, data: Any) -> int:
        if self.tell() >= self._room:
            raise BrokenPipeError
        return super().write(bytes(data[:3]))


def test_lines_are_written_whole_whatever_the_reader_takes() -> None:
    out = Narrow(1000)
    printer = Printer(out, coloured=False)
    printer.line(12, b"\xff long line")
    printer.line(COORDINATOR_ID, b"hello")
    assert out.getvalue() == b"[12] \xff long line\n[coordinator] hello\n"


def test_a_reader_that_went_away_is_noticed_once() -> None:
    printer = Printer(Narrow(4), coloured=False)
    printer.line(0, b"text")
    assert printer.broken
    printer.line(0, b"text")


def test_colours_are_those_of_the_launcher() -> None:
    out = io.BytesIO()
    Printer(out, coloured=True).line(1, b"x")
    assert out.getvalue() == b"\x1b[33m[1]\x1b[0m x\n"


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("v1.37.2", "ok"),
        ("v1.31.0-gke.1", "ok"),
        ("v1.30.4+k3s1", "warn"),
        ("v1.28.1", "fail"),
        ("?", "warn"),
    ],
)
def test_versions_of_the_api_server(version: str, level: str) -> None:
    cluster = SimpleNamespace(server="https://x", namespace="ml", raw=lambda path: {"gitVersion": version})
    patient = checks.Patient(cluster=cluster, gpu_resource="g/g", queue="", now=NOW)  # type: ignore[arg-type]
    assert [finding.level for finding in checks.api_server(patient)] == [level]


def test_findings_as_lines() -> None:
    checked = [
        ("nodes", findings.Finding(findings.OK, "fine")),
        ("GPUs", findings.Finding(findings.FAIL, "none", "buy some")),
    ]
    assert findings.lines(checked) == [
        "ok      nodes  fine",
        "fail    GPUs   none",
        "               -> buy some",
        "",
        "jobs cannot run here yet: 1 failure, 0 warnings, 0 could not be seen",
    ]
    assert not findings.is_fine(checked)
    assert findings.is_fine(checked[:1])
