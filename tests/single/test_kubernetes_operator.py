"""What an operator reads before its coordinator serves anybody."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ringps_launcher.kubernetes import operator
from ringps_launcher.kubernetes.errors import ForbiddenError
from ringps_launcher.kubernetes.operator import Operator, OperatorSettings
from ringps_launcher.kubernetes.status import JobFacts
from tests.single.test_kubernetes_lease import Server


class Cluster(Server):
    """Refuses the ConfigMap so many times, as a server does that has yet to learn of all rights."""

    def __init__(self, refusals: int, **objects: dict[str, Any]) -> None:
        super().__init__(Lease={"spec": {}}, **objects)
        self.refusals = refusals

    def within(self, read_s: float) -> Cluster:
        return self

    def get(self, kind: str, name: str) -> dict[str, Any]:
        if kind == "ConfigMap" and self.refusals > 0:
            self.refusals -= 1
            raise ForbiddenError("get ConfigMap: no right")
        return super().get(kind, name)


def read(cluster: Cluster) -> tuple[Operator, list[str]]:
    """Whoever follows on a coordinator that has recorded the end of the job."""
    said: list[str] = []
    facts = JobFacts(world_size=2, min_workers=1, max_restarts=3)
    settings = OperatorSettings(name="job", identity="pod-b/2", facts=facts)
    found = Operator(settings, cluster, said.append, lambda reason: None)  # type: ignore[arg-type]
    assert found.wait_for_lease(threading.Event())
    found.close()
    return found, said


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "RETRY_S", 0.01)


DONE = {"data": {"verdict": "done"}}


def test_a_right_that_comes_late_is_waited_for() -> None:
    found, said = read(Cluster(3, ConfigMap=DONE))
    assert found.recorded_verdict() == "done"
    assert said == []


def test_a_right_that_never_comes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_RIGHTS_S", 0.1)
    found, said = read(Cluster(10**9, ConfigMap=DONE))
    assert found.recorded_verdict() == ""
    assert said[0] == "get ConfigMap: no right; nobody will see this job's status"


def test_a_status_that_is_gone_is_not_waited_for() -> None:
    found, said = read(Cluster(0))
    assert found.recorded_verdict() == ""
    assert "nobody will see this job's status" in said[0]
