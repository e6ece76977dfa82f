"""A job of pods in tests: submitted by the command, watched through the API server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringps_launcher.kubernetes import names
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, NotFoundError
from tests.k8s.commands import IMAGE
from tests.k8s.controlplane import ControlPlane
from tests.k8s.kubelet import Fleet
from tests.k8s.ledger import Ledger
from tests.k8s.waiting import eventually

HERE = Path(__file__).parent
TRAIN = HERE / "train.py"
SMALL = ("--cpu", "100m", "--memory", "1Gi", "--shm", "128Mi", "--coordinator-priority-class", "")


class Pods:
    """A namespace with nodes and a volume, in which jobs are started."""

    def __init__(self, plane: ControlPlane, namespace: str, fleet: Fleet, directory: Path) -> None:
        self.plane = plane
        self.namespace = namespace
        self.fleet = fleet
        self.directory = directory
        self.api: Cluster = plane.connect(namespace)

    def volume(self, name: str = "work") -> Path:
        """A claim of this name, and the directory behind it."""
        path = self.directory / f"volume-{name}"
        path.mkdir()
        size = {"storage": "1Gi"}
        self.plane.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{self.namespace}-{name}"},
                "spec": {
                    "capacity": size,
                    "accessModes": ["ReadWriteMany"],
                    "storageClassName": "",
                    "hostPath": {"path": str(path)},
                    "claimRef": {"namespace": self.namespace, "name": name},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name},
                "spec": {
                    "accessModes": ["ReadWriteMany"],
                    "storageClassName": "",
                    "volumeName": f"{self.namespace}-{name}",
                    "resources": {"requests": size},
                },
            },
            namespace=self.namespace,
        )
        return path

    def let_coordinators_see_nodes(self) -> None:
        """As k8s/base does for its namespace."""
        self.plane.apply(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRole",
                "metadata": {"name": f"{self.namespace}-nodes"},
                "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}],
            },
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": f"{self.namespace}-nodes"},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": f"{self.namespace}-nodes",
                },
                "subjects": [
                    {
                        "apiGroup": "rbac.authorization.k8s.io",
                        "kind": "Group",
                        "name": f"system:serviceaccounts:{self.namespace}",
                    }
                ],
            },
        )

    def close(self) -> None:
        for job in self.api.list("Job"):
            self.api.delete("Job", job["metadata"]["name"])
        for volume in self.api.list("PersistentVolume"):
            if volume["metadata"]["name"].startswith(f"{self.namespace}-"):
                self.api.delete("PersistentVolume", volume["metadata"]["name"])
        self.api.close()

    def ringps(
        self, *arguments: str, check: bool = True, limit_s: float = 100
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as a user does."""
        command, *rest = arguments
        done = subprocess.run(
            [sys.executable, "-m", "ringps_launcher", command, "-N", self.namespace, *rest],
            env={**os.environ, "KUBECONFIG": str(self.plane.kubeconfig), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        if check:
            assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done

    def train(self, name: str, workers: int, *options: str, script: tuple[str, ...] = ()) -> Job:
        """Submit `train.py`, with a volume of its own."""
        directory = self.volume(name)
        self.ringps(
            "submit", "--name", name, "--image", IMAGE, "-n", str(workers), *SMALL,
            "--volume", f"{name}:/data", "--checkpoint-dir", "/data/ckpt", "--file", str(TRAIN), *options,
            "train.py", *script,
        )  # fmt: skip
        return Job(self, name, directory)


class Job:
    """One that was submitted."""

    def __init__(self, pods: Pods, name: str, directory: Path | None = None) -> None:
        self.cluster = pods
        self.name = name
        self.directory = directory
        self._api = pods.api

    @property
    def ledger(self) -> Ledger:
        assert self.directory is not None
        return Ledger(self.directory)

    def job(self) -> dict[str, Any]:
        return self._api.get("Job", self.name)

    def condition(self) -> str:
        """ "Complete", "Failed" or ""."""
        for one in self.job().get("status", {}).get("conditions") or []:
            if one["type"] in ("Complete", "Failed") and one["status"] == "True":
                return str(one["type"])
        return ""

    def status(self) -> dict[str, Any]:
        """What the coordinator published last."""
        with contextlib.suppress(NotFoundError):
            data = self._api.get("ConfigMap", names.status_map(self.name)).get("data") or {}
            return dict(json.loads(data.get(names.STATUS_ENTRY, "{}")))
        return {}

    def pods(self, component: str = names.WORKER) -> list[dict[str, Any]]:
        return self._api.list("Pod", labels=names.selector(self.name, component))

    def pod(self, worker_id: int) -> str:
        """The pod of this worker that runs and is not about to end."""

        def look() -> str:
            for pod in self.pods():
                index = pod["metadata"]["annotations"][names.INDEX_ANNOTATION]
                alive = pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
                if index == str(worker_id) and alive:
                    return str(pod["metadata"]["name"])
            return ""

        return eventually(look, f"a pod of worker {worker_id} runs", limit_s=90)

    def node_of(self, pod: str) -> str:
        return str(self._api.get("Pod", pod)["spec"]["nodeName"])

    def coordinator(self) -> str:
        """The coordinator's pod that serves."""
        return eventually(self.coordinator_if_any, "a coordinator serves", limit_s=60)

    def coordinator_if_any(self) -> str:
        for pod in self.pods(names.COORDINATOR):
            ready = any(
                one["type"] == "Ready" and one["status"] == "True"
                for one in pod["status"].get("conditions") or []
            )
            if ready and "deletionTimestamp" not in pod["metadata"]:
                return str(pod["metadata"]["name"])
        return ""

    def until_step(self, step: int, limit_s: float = 90) -> None:
        self.until(lambda: self.ledger.last_step >= step, f"step {step}", limit_s)

    def until_members(self, *worker_ids: int, limit_s: float = 90) -> None:
        def look() -> bool:
            return sorted(member["worker_id"] for member in self.status().get("members", [])) == sorted(
                worker_ids
            )

        self.until(look, f"members {worker_ids}", limit_s)

    def until_members_count(self, count: int, limit_s: float = 90) -> None:
        self.until(lambda: len(self.status().get("members", [])) == count, f"{count} members", limit_s)

    def finish(self) -> None:
        """Have the script end, and see that everything was trained once."""
        assert self.directory is not None
        (self.directory / "GO").touch()
        self.until_complete()
        self.ledger.check()

    def until_complete(self, limit_s: float = 120) -> None:
        self.until(lambda: self._ended() == "Complete", "the job is complete", limit_s)

    def _ended(self) -> str:
        try:
            found = self.condition()
        except ClusterError:  # the API server may be away
            return ""
        assert found != "Failed", self.describe()
        return found

    def until(self, found: Callable[[], object], what: str, limit_s: float = 90) -> None:
        def look() -> bool:
            try:
                return bool(found())
            except ClusterError:
                return False

        try:
            eventually(look, what, limit_s=limit_s, every_s=0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None

    def describe(self) -> str:
        """All that helps to see what has become of it."""
        with contextlib.suppress(ClusterError):
            lines = [json.dumps(self.status(), indent=1), json.dumps(self.job().get("status"), indent=1)]
            for pod in [*self.pods(names.COORDINATOR), *self.pods()]:
                name, status = pod["metadata"]["name"], pod["status"]
                lines.append(f"--- {name} on {pod['spec'].get('nodeName')}: {status.get('phase')} "
                             f"{pod['metadata'].get('deletionTimestamp', '')} {status.get('reason', '')} "
                             f"{[c.get('state') for c in status.get('containerStatuses', [])]}")  # fmt: skip
                with contextlib.suppress(ClusterError):
                    container = names.COORDINATOR if "coordinator" in name else names.WORKER
                    with self._api.logs(name, container=container, tail=25) as log:
                        lines += [line.decode(errors="replace").rstrip() for line in log]
            return "\n".join(lines)
        return "the API server does not answer"
