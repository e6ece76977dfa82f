"""A node: registers itself, gives signs of life, and runs the pods that are bound to it."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.k8s.kubelet import server, status
from tests.k8s.kubelet.api import STRATEGIC, Api, ApiError, Follower
from tests.k8s.kubelet.images import Image
from tests.k8s.kubelet.network import Network
from tests.k8s.kubelet.pod import Pod
from tests.k8s.kubelet.reports import Reporter
from tests.k8s.kubelet.surroundings import Surroundings

Object = dict[str, Any]
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_LEASE_S = 40
_VERSION = "v1.37.2"
_CHECK_EVERY = 3
"""Heartbeats from one look at the node's own object to the next."""
_HEALTHY = (
    ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID"),
    ("Ready", "True", "KubeletReady"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a node says of itself."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    cpu: str = "8"
    memory: str = "16Gi"
    pods: int = 40
    gpus: int = 0
    extended: Mapping[str, str] = field(default_factory=dict)
    """Further resources."""
    taints: tuple[Mapping[str, str], ...] = ()
    heartbeat_s: float = 1.0

    def capacity(self) -> dict[str, str]:
        gpus = {"nvidia.com/gpu": str(self.gpus)} if self.gpus else {}
        return {"cpu": self.cpu, "memory": self.memory, "pods": str(self.pods), **gpus, **self.extended}


class Node:
    """Made by `Fleet.add`. `start` and `stop` are the kubelet's; its pods go on in between."""

    def __init__(
        self,
        shape: Shape,
        *,
        address: str,
        api: Api,
        network: Network,
        images: Mapping[str, Image],
        directory: Path,
        dns: str,
        services: Mapping[str, str],
    ) -> None:
        self.shape = shape
        self.name = shape.name
        self.address = address
        self._api = api
        self._pods: dict[str, Pod] = {}
        self._lock = threading.RLock()
        self._certificate = directory / "server.pem"
        directory.mkdir(parents=True, exist_ok=True)
        server.write_certificate(self._certificate, [address])
        self._reporter = Reporter(api, shape.name)
        self._around = Surroundings(
            node=shape.name,
            host_ip=address,
            allocatable=shape.capacity(),
            api=api,
            reporter=self._reporter,
            network=network,
            images=images,
            directory=directory,
            dns=dns,
            services=services,
            admission=threading.Lock(),
            neighbours=self._neighbours,
            gone=self._gone,
        )
        self._server: server.Server | None = None
        self._follower: Follower | None = None
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None
        self._registered = False

    @property
    def runs(self) -> bool:
        """Whether its kubelet does."""
        return self._follower is not None

    @property
    def pods(self) -> list[Pod]:
        with self._lock:
            return list(self._pods.values())

    def start(self) -> None:
        """Register the node, or say that it is back, and begin to look after its pods.

        If the API server is away, that is done once it is there. Raises `ApiError` if it refuses.
        """
        assert not self.runs, f"node {self.name} runs already"
        self._server = server.Server(self.address, self._certificate, self._find_log)
        self._registered = False
        try:
            self._register()
        except ApiError as error:
            if error.code != 0:
                raise
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="kubelet-heart", daemon=True)
        self._heart.start()
        for pod in self.pods:
            pod.halt(False)
        self._reporter.hold(False)
        chosen = urllib.parse.quote(f"spec.nodeName={self.name}")
        self._follower = Follower(
            self._api, f"/api/v1/pods?fieldSelector={chosen}", listed=self._listed, changed=self._changed
        )

    def stop(self) -> None:
        """Say nothing more and act no more, like a kubelet that hangs; its pods run on."""
        if self._follower is None or self._heart is None or self._server is None:
            return
        self._stopped.set()
        self._reporter.hold(True)
        self._follower.close()
        for pod in self.pods:
            pod.halt(True)
        self._heart.join()
        self._server.close()
        self._follower = self._heart = self._server = None

    def close(self) -> None:
        """End it and all that runs on it, and leave the objects that the API server has."""
        self.stop()
        self._reporter.close()
        for pod in self.pods:
            pod.close()

    def remove_objects(self) -> None:
        """Take the node and its pods away from the API server too. Raises `ApiError`."""
        for pod in self.pods:
            path = f"/api/v1/namespaces/{pod.key[0]}/pods/{pod.key[1]}"
            if not pod.over:  # the Job controller waits for a final phase, deleted or not
                with contextlib.suppress(ApiError):
                    lost = {"phase": "Failed", "reason": "NodeLost", "message": "its node was removed"}
                    self._api.patch(f"{path}/status", {"metadata": {"uid": pod.uid}, "status": lost})
            self._api.delete(path, pod.uid)
        self.delete_object()
        self._api.delete(f"{_LEASES}/{self.name}")

    def delete_object(self) -> None:
        self._api.delete(f"/api/v1/nodes/{self.name}")

    # Pods.

    def _listed(self, items: list[Object]) -> None:
        present = {item["metadata"]["uid"] for item in items}
        for pod in self.pods:
            if pod.uid not in present:
                pod.update(pod.object, removed=True)
        for item in items:
            self._changed("MODIFIED", item)

    def _changed(self, kind: str, found: Object) -> None:
        uid = found["metadata"]["uid"]
        with self._lock:
            pod = self._pods.get(uid)
            if pod is None:
                if kind == "DELETED":
                    return
                pod = self._pods[uid] = Pod(found, self._around)
                pod.start()
                return
        pod.update(found, removed=kind == "DELETED")

    def _neighbours(self) -> list[Object]:
        return [pod.object for pod in self.pods if pod.admitted and not pod.over]

    def _gone(self, uid: str) -> None:
        with self._lock:
            self._pods.pop(uid, None)

    def _find_log(self, namespace: str, name: str, container: str, previous: bool) -> server.Log:
        for pod in self.pods:
            if pod.key == (namespace, name):
                return server.Log(*pod.log(container, previous))
        raise LookupError(f'pod "{name}" not found')

    # The node's own object.

    def _beat(self) -> None:
        for count in itertools.count(1):
            if self._stopped.wait(self.shape.heartbeat_s):
                return
            with contextlib.suppress(ApiError):  # the next one may arrive
                if not self._registered:
                    self._register()
                self._renew()
                if count % _CHECK_EVERY == 0:
                    self._check()

    def _register(self) -> None:
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            **self.shape.labels,
        }
        body: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"taints": [dict(taint) for taint in self.shape.taints]},
            "status": self._status(),
        }
        try:
            self._api.post("/api/v1/nodes", body)
        except ApiError as error:
            if error.code != 409:
                raise
            self._api.patch(f"/api/v1/nodes/{self.name}/status", {"status": self._status()}, STRATEGIC)
        self._renew()
        self._registered = True

    def _renew(self) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self.name, "leaseDurationSeconds": _LEASE_S, "renewTime": now}
        try:
            self._api.patch(f"{_LEASES}/{self.name}", {"spec": spec})
        except ApiError as error:
            if error.code != 404:
                raise
            about = {"name": self.name, "namespace": "kube-node-lease"}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": about, "spec": spec}
            with contextlib.suppress(ApiError):  # its namespace may not be there yet
                self._api.post(_LEASES, lease)

    def _check(self) -> None:
        """The controllers may hold the node for dead: then tell them that it is not."""
        found = self._api.get(f"/api/v1/nodes/{self.name}")
        now = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions") or ()}
        if any(now.get(kind) != value for kind, value, _ in _HEALTHY):
            self._api.patch(f"/api/v1/nodes/{self.name}/status", {"status": self._status()}, STRATEGIC)

    def _status(self) -> Object:
        assert self._server is not None
        now = status.timestamp(time.time())
        return {
            "capacity": self.shape.capacity(),
            "allocatable": self.shape.capacity(),
            "addresses": [
                {"type": "InternalIP", "address": self.address},
                {"type": "Hostname", "address": self.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.port}},
            "nodeInfo": {
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
                "kernelVersion": "",
                "osImage": "processes of a test",
                "containerRuntimeVersion": "process://1",
                "kubeletVersion": _VERSION,
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": "amd64",
            },
            "conditions": [
                {
                    "type": kind,
                    "status": value,
                    "reason": reason,
                    "message": "",
                    "lastHeartbeatTime": now,
                    "lastTransitionTime": now,
                }
                for kind, value, reason in _HEALTHY
            ],
        }
