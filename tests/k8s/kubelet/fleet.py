"""The composition root: nodes with a network, names and a way to the API server in common."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.k8s.kubelet import network
from tests.k8s.kubelet.api import Api, ApiError
from tests.k8s.kubelet.dns import Dns
from tests.k8s.kubelet.faults import Faults
from tests.k8s.kubelet.images import Image
from tests.k8s.kubelet.network import GATEWAY, Network
from tests.k8s.kubelet.node import Node, Shape
from tests.k8s.kubelet.relay import Relay

_SERVICE = ("10.96.0.1", 443)
_DNS = ("10.96.0.10", 53)


class Fleet(Faults):
    """Nodes of one cluster. Use it as a context manager: at its end nothing runs and no Node object is left.

    `directory` holds logs and volumes; `images` may change while pods wait for one.
    """

    def __init__(self, kubeconfig: Path, directory: Path, images: Mapping[str, Image]) -> None:
        self.nodes: dict[str, Node] = {}
        self.images = dict(images)
        self._directory = directory
        self._addresses = iter(range(1, 250))
        self._block = f"127.{random.randint(64, 191)}.{random.randint(0, 255)}"
        self._exposed: dict[int, Relay] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._api = Api(kubeconfig)
            self._stack.callback(self._api.close)
            self._network = Network((_SERVICE[0], _DNS[0]))
            self._stack.callback(self._network.close)
            relay = Relay(self._network.listen(*_SERVICE), (self._api.host, self._api.port))
            self._stack.callback(relay.close)
            dns = Dns(self._api, self._network.bind(*_DNS))
            self._stack.callback(dns.close)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, name: str, **shape: object) -> Node:
        """A new node, registered and running; `shape` is as in `Shape`."""
        assert name not in self.nodes, f"there is a node {name} already"
        node = Node(
            Shape(name=name, **shape),  # type: ignore[arg-type]
            address=f"{self._block}.{next(self._addresses)}",
            api=self._api,
            network=self._network,
            images=self.images,
            directory=self._directory / name,
            dns=_DNS[0],
            services={
                "KUBERNETES_SERVICE_HOST": _SERVICE[0],
                "KUBERNETES_SERVICE_PORT": str(_SERVICE[1]),
                "KUBERNETES_SERVICE_PORT_HTTPS": str(_SERVICE[1]),
                "KUBERNETES_PORT": f"tcp://{_SERVICE[0]}:{_SERVICE[1]}",
            },
        )
        self.nodes[name] = node
        node.start()
        return node

    def remove(self, node: Node | str) -> None:
        """End a node and all that runs on it, and delete its objects if the API server is there."""
        node = self._node(node)
        del self.nodes[node.name]
        node.close()
        with contextlib.suppress(ApiError):
            node.remove_objects()

    def expose(self, port: int) -> str:
        """Let pods reach a port of this machine's 127.0.0.1; the "host:port" at which they do."""
        if port not in self._exposed:
            relay = Relay(self._network.listen(GATEWAY, port), ("127.0.0.1", port))
            self._exposed[port] = relay
            self._stack.callback(relay.close)
        return f"{GATEWAY}:{port}"

    def close(self) -> None:
        with self._stack:
            for node in list(self.nodes.values()):
                self.remove(node)


def obstacle() -> str | None:
    """Why this machine cannot run pods as processes; None if it can."""
    if os.geteuid() != 0:
        return "pods need root: they get namespaces of their own"
    for command in ("nsenter", "unshare"):
        if shutil.which(command) is None:
            return f"pods need the command `{command}` (util-linux)"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _TRY],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if tried.returncode != 0:
        return f"pods need mount and pid namespaces and overlays: {' '.join(tried.stderr.split())}"
    return network.obstacle()


_TRY = (
    "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/r && "
    "mount -t overlay none -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r"
)
