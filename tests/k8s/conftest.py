"""A real control plane for the tests of this directory, started once, and namespaces in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import NotFoundError
from tests.k8s.commands import IMAGE, Run
from tests.k8s.component import StartError
from tests.k8s.controlplane import ControlPlane, find_assets
from tests.k8s.kubelet import Fleet, Image, obstacle
from tests.k8s.reachable import Reachable
from tests.k8s.waiting import eventually
from tests.launching import ROOT
from tests.leftovers import no_leftovers  # noqa: F401
from tests.support import require

_BIN = str(Path(sys.executable).parent)
_KEPT = tuple(dict.fromkeys((str(ROOT), sys.prefix, sys.base_prefix)))
_TIMEOUT_S = 120
"""Of each test without a limit of its own: the first one that runs also starts the control plane."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


class Existing(Reachable):
    """A cluster that somebody else runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        require(False, f"an existing cluster is not ours to control (this test uses its `{name}`)")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Reachable]:
    """A `ControlPlane` of our own, or the cluster that RINGPS_TEST_KUBECONFIG names."""
    # Not below pytest's own directory: the path of a unix socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="ringps-k8s-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if kubeconfig := os.environ.get("RINGPS_TEST_KUBECONFIG"):
            kubectl = shutil.which("kubectl")
            require(kubectl is not None, "RINGPS_TEST_KUBECONFIG is set, but there is no kubectl on PATH")
            yield Existing(directory, Path(kubeconfig), Path(str(kubectl)))
            return
        why, assets = "", Path()
        try:
            assets = find_assets()
        except StartError as error:
            why = str(error)
        require(not why, why)
        plane = ControlPlane(directory, assets)
        plane.start()
        stack.callback(plane.stop)
        yield plane


@pytest.fixture
def control_plane(cluster: Reachable) -> ControlPlane:
    """The cluster, of which this test stops parts, or to which it adds nodes."""
    require(isinstance(cluster, ControlPlane), "an existing cluster is not ours to control")
    assert isinstance(cluster, ControlPlane)
    return cluster


@pytest.fixture
def namespace(cluster: Reachable) -> Iterator[str]:
    """A fresh namespace, in which only pods that keep to the restricted Pod Security Standard may run."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    with new_namespace(cluster, name):
        yield name


@pytest.fixture
def api(cluster: Reachable, namespace: str) -> Iterator[Cluster]:
    """The administrator's connection to the fresh namespace."""
    with cluster.connect(namespace) as connection:
        yield connection


@pytest.fixture
def ringps(cluster: Reachable, namespace: str, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command, in that namespace."""
    return Run(cluster.kubeconfig, namespace, capfd)


@pytest.fixture(scope="session")
def runs_pods() -> None:
    """That pods can be run on this machine."""
    why = obstacle()
    require(why is None, str(why))


@pytest.fixture
def nodes(control_plane: ControlPlane, namespace: str, runs_pods: None, tmp_path: Path) -> Iterator[Fleet]:
    """Nodes that run pods as processes: `nodes.add("n1", labels=..., gpus=4)`. They end with the test.

    The image `ringps/test:1` is this machine, with our environment first on PATH; for others, set
    `nodes.images["name"] = Image(...)`.
    """
    with Fleet(
        control_plane.kubeconfig, tmp_path / "nodes", {IMAGE: Image(path=(_BIN,), kept=_KEPT)}
    ) as fleet:
        try:
            yield fleet
        finally:
            _mend(control_plane)


@contextlib.contextmanager
def new_namespace(cluster: Reachable, name: str, level: str = "restricted") -> Iterator[None]:
    """A namespace, whose pods are removed at the end whether their nodes live or not."""
    _mend(cluster)
    labels = {"pod-security.kubernetes.io/enforce": level}
    metadata = {"name": name, "labels": labels}
    cluster.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    try:
        eventually(lambda: _is_furnished(cluster, name), f"{name} has its service account and its CA")
        yield
    finally:
        _mend(cluster)
        # Jobs first: they hold on to their pods. Then pods by force: they would wait for their nodes. The
        # namespace itself goes in its own time.
        for job in cluster.api.list("Job", namespace=name):
            cluster.api.delete("Job", job["metadata"]["name"], namespace=name)
        cluster.api.delete("Namespace", name)
        eventually(lambda: not _force_delete_pods(cluster, name), f"no pod is left in {name}", every_s=0.2)


def _mend(cluster: Reachable) -> None:
    """Start what a test had stopped when it failed."""
    if isinstance(cluster, ControlPlane):
        cluster.mend()


def _is_furnished(cluster: Reachable, namespace: str) -> bool:
    try:
        cluster.api.get("ServiceAccount", "default", namespace)
        cluster.api.get("ConfigMap", "kube-root-ca.crt", namespace)
    except NotFoundError:
        return False
    return True


def _force_delete_pods(cluster: Reachable, namespace: str) -> list[str]:
    """The pods that are left of a namespace that ends."""
    names = [pod["metadata"]["name"] for pod in cluster.api.list("Pod", namespace=namespace)]
    for name in names:
        cluster.api.delete("Pod", name, grace_s=0, namespace=namespace)
    return names
