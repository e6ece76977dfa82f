"""The commands that change a cluster, as users type them, and what they leave there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringps_launcher.cli import main
from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.bundle import KINDS
from ringps_launcher.kubernetes.client import Cluster
from tests.k8s.waiting import eventually

IMAGE = "ringps/test:1"
SMALL = ("--image", IMAGE, "-n", "2", "--cpu", "100m", "--memory", "256Mi", "--shm", "64Mi")
NO_CLASS = ("--coordinator-priority-class", "")


class Run:
    """The command as a user of a kubeconfig types it, and what it says."""

    def __init__(self, kubeconfig: Path, namespace: str, capfd: pytest.CaptureFixture[str]) -> None:
        self.namespace = namespace
        self._kubeconfig = kubeconfig
        self._capfd = capfd
        self.out = self.err = ""

    def __call__(self, *arguments: str, namespace: str | None = None) -> int:
        self._capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(self._kubeconfig))
            command, *rest = arguments
            code = main([command, "-N", namespace or self.namespace, *rest])
        self.out, self.err = self._capfd.readouterr()
        return code

    def refuses(self, *arguments: str, words: str, namespace: str | None = None) -> str:
        """It fails with one line on stderr that has the words in it; the line."""
        code = self(*arguments, namespace=namespace)
        lines = self.err.splitlines()
        assert code == 1, (code, self.out, self.err)
        assert lines and words in lines[-1], self.err
        assert all(line.startswith("ringps: ") for line in lines), self.err
        return lines[-1]


def objects(api: Cluster, name: str) -> list[str]:
    """What is there of a job, pods included."""
    found = [
        f"{kind}/{one['metadata']['name']}"
        for kind in (*KINDS, "Pod")
        for one in api.list(kind, labels=f"{names.INSTANCE_LABEL}={name}")
    ]
    return sorted(found)


def nothing_is_left(api: Cluster, name: str) -> None:
    eventually(lambda: not objects(api, name), f"nothing is left of {name}: {objects(api, name)}")


def submitted(ringps: Run, name: str, *options: str) -> None:
    code = ringps("submit", "--name", name, *SMALL, *NO_CLASS, "--no-wait", *options, "/app/train.py")
    assert code == 0, ringps.err
