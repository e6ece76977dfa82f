"""The pods' network: a bridge in a network namespace that only this process holds, and one namespace a pod.

The machine's own network stays as it is. Everything disappears with the descriptors and processes that hold
it, however these end. Pods reach each other, and what listens at an address of the bridge; nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

from tests.k8s.kubelet import system

Result = TypeVar("Result")

GATEWAY = "10.244.0.1"
"""Where pods reach what is relayed from the machine (see `Fleet.expose`)."""
_BRIDGE = "pods"
_ADDRESS = "02:00:0a:f4:00:01"


class Network:
    """Pods get addresses 10.244.1.0 and up, none of them twice: neighbours remember where an address was."""

    def __init__(self, services: tuple[str, ...]) -> None:
        """`services` are further addresses of the bridge, for servers made with `listen` and `bind`."""
        self._numbers = itertools.count(256)
        self._ports = itertools.count(1)
        self._lock = threading.Lock()
        self._namespace = _new_namespace()
        lines = [
            "link set lo up",
            # Left to itself it takes on the lowest of its ports' addresses: another one as pods come and go,
            # which those that are there would learn only after half a minute.
            f"link add name {_BRIDGE} address {_ADDRESS} type bridge",
            f"addr add {GATEWAY}/16 dev {_BRIDGE}",
            *(f"addr add {address}/32 dev {_BRIDGE}" for address in services),
            f"link set {_BRIDGE} up",
        ]
        inside(self._namespace, lambda: _ip(lines))

    def close(self) -> None:
        os.close(self._namespace)

    def join(self) -> Attachment:
        """A network namespace of a new pod."""
        with self._lock:
            number, port = next(self._numbers), f"pod{next(self._ports)}"
        address = f"10.244.{number >> 8}.{number & 255}"
        namespace = _new_namespace()
        try:
            path = f"/proc/{os.getpid()}/fd/{namespace}"
            joined = [
                f"link add name {port} type veth peer name eth0 netns {path}",
                f"link set {port} master {_BRIDGE} up",
            ]
            inside(self._namespace, lambda: _ip(joined))
            up = [
                "link set lo up",
                f"addr add {address}/16 dev eth0",
                "link set eth0 up",
                f"route add default via {GATEWAY}",
            ]
            inside(namespace, lambda: _ip(up))
        except BaseException:
            os.close(namespace)
            raise
        return Attachment(self, address, port, namespace)

    def unplug(self, port: str) -> None:
        """From now on nothing comes from the pod or reaches it, not even the end of its connections."""
        inside(self._namespace, lambda: _ip([f"link set {port} down"]))

    def listen(self, address: str, port: int) -> socket.socket:
        """A listening TCP socket that pods can connect to."""
        return inside(self._namespace, lambda: socket.create_server((address, port), backlog=64))

    def bind(self, address: str, port: int) -> socket.socket:
        """A UDP socket that pods can send to."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.bind((address, port))
            return made

        return inside(self._namespace, make)


class Attachment:
    """A pod's place in the network; its containers share it, and it stays when one is restarted."""

    def __init__(self, network: Network, address: str, port: str, namespace: int) -> None:
        self._network = network
        self._port = port
        self.address = address
        self.namespace: int | None = namespace
        """A descriptor of the network namespace, until `close`."""

    def unplug(self) -> None:
        """As if the machine had lost its power: no connection is closed, there is just silence."""
        with contextlib.suppress(OSError):
            self._network.unplug(self._port)

    def connect(self, port: int, limit_s: float) -> None:
        """Connect to a port of the pod, as a probe does, and close at once. Raises `OSError`."""
        assert self.namespace is not None
        inside(self.namespace, lambda: socket.create_connection((self.address, port), limit_s).close())

    def close(self) -> None:
        if self.namespace is not None:
            os.close(self.namespace)
            self.namespace = None


def inside(namespace: int, action: Callable[[], Result]) -> Result:
    """Do something in a network namespace; what sockets and processes it makes are there for good."""

    def enter() -> Result:
        system.setns(namespace, system.NEW_NETWORK)
        return action()

    return _in_thread(enter)


def obstacle() -> str | None:
    """Why this machine cannot have such a network."""
    if shutil.which("ip") is None:
        return "pods need the command `ip` (iproute2)"
    try:
        network = Network(())
        try:
            network.join().close()
        finally:
            network.close()
    except OSError as error:
        return f"pods need network namespaces, bridges and veth: {error}"
    return None


def _new_namespace() -> int:
    def make() -> int:
        system.unshare(system.NEW_NETWORK)
        return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


def _in_thread(action: Callable[[], Result]) -> Result:
    """In a thread of its own: namespaces belong to threads, and one that has changed its own must end."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="kubelet-namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _ip(lines: list[str]) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=20
    )
    if done.returncode != 0:
        raise OSError(f"ip failed: {' '.join(done.stderr.split())}")
