"""Nodes that are objects alone: pods are bound to them, and never run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ringps_launcher.kubernetes.client import Cluster
from tests.k8s.waiting import eventually

GPU = "nvidia.com/gpu"


@contextlib.contextmanager
def bare_nodes(api: Cluster, *names: str, gpus: int) -> Iterator[None]:
    """Nodes that are ready, in zones called after their first letters. They give no sign of life: the control
    plane must have been told to wait long for one (`node_grace_s`).
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            labels = {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": name[0]}
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
            api.create(node)
            stack.callback(api.delete, "Node", name)
            room = {"cpu": "32", "memory": "128Gi", "pods": "110", GPU: str(gpus)}
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
            status = {"capacity": room, "allocatable": room, "conditions": [ready]}
            api.patch("Node", name, {"status": status}, subresource="status")

        def tainted() -> list[str]:
            return [name for name in names if api.get("Node", name)["spec"].get("taints")]

        eventually(lambda: not tainted(), f"{', '.join(names)} have no taint any more")
        yield
