"""What can happen to pods and nodes. Each fault raises if it hits nothing."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from tests.k8s.kubelet.node import Node
from tests.k8s.kubelet.pod import Pod
from tests.k8s.kubelet.slot import Slot

_LIMIT_S = 10.0
_LOOK_S = 0.01


class Faults:
    """The faults of a fleet; whoever inherits knows the nodes."""

    nodes: dict[str, Node]

    def pod(self, name: str, namespace: str | None = None) -> Pod:
        """A pod that a node has, by its name. Raises `LookupError`."""
        found = [p for node in self.nodes.values() for p in node.pods if p.key[1] == name]
        found = [p for p in found if namespace is None or p.key[0] == namespace]
        live = [p for p in found if not p.over] or found
        if len(live) != 1:
            raise LookupError(f"{len(live)} pods called {name} on nodes {', '.join(self.nodes) or 'none'}")
        return live[0]

    def kill_pod(self, name: str, number: int = signal.SIGKILL, namespace: str | None = None) -> None:
        """Signal every process of the pod, as if it had crashed. The node reports it as it does all ends."""
        for slot in _running(self.pod(name, namespace)):
            assert slot.container is not None
            if number == signal.SIGKILL:
                slot.container.kill()
            else:
                slot.container.signal_all(number)

    def kill_process(
        self, name: str, matching: str, number: int = signal.SIGKILL, namespace: str | None = None
    ) -> list[int]:
        """Signal those processes of the pod whose command line contains a text; their ids on this machine.
        One may end by itself, or by the end of another, before its turn."""
        hit = []
        for pid, command in self.processes(name, namespace).items():
            if matching in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
                    hit.append(pid)
        if not hit:
            raise LookupError(f"pod {name} has no process with {matching!r} in its command line")
        return hit

    def oom_kill(self, name: str, namespace: str | None = None) -> None:
        """End the pod as the kernel does that has no memory left for it."""
        for slot in _running(self.pod(name, namespace)):
            assert slot.container is not None
            slot.out_of_memory = True
            slot.container.kill()

    def freeze_pod(self, name: str, namespace: str | None = None) -> None:
        """Stop its processes where they are. The kernel goes on for them: connections stay open."""
        _freeze(self.pod(name, namespace))

    def thaw_pod(self, name: str, namespace: str | None = None) -> None:
        for slot in _running(self.pod(name, namespace)):
            assert slot.container is not None
            slot.container.signal_all(signal.SIGCONT)

    def evict(
        self,
        name: str,
        message: str = "The node was low on resource: memory.",
        *,
        grace_s: float = 1.0,
        namespace: str | None = None,
    ) -> None:
        """End the pod as its node does that is short of something."""
        pod = self.pod(name, namespace)
        _running(pod)
        pod.evict(message, grace_s)

    def processes(self, name: str, namespace: str | None = None) -> dict[int, str]:
        """The pod's processes, by their ids on this machine, with their command lines."""
        found: dict[int, str] = {}
        for slot in _running(self.pod(name, namespace)):
            found |= _processes(slot)
        return found

    def freeze_node(self, node: Node | str, *, processes: bool = True) -> None:
        """Its kubelet does nothing more, and with `processes` its pods stand still too."""
        node = self._node(node)
        node.stop()
        for pod in node.pods if processes else ():
            if pod.running():
                _freeze(pod)

    def thaw_node(self, node: Node | str) -> None:
        node = self._node(node)
        for pod in node.pods:
            for slot in pod.running():
                assert slot.container is not None
                slot.container.signal_all(signal.SIGCONT)
        node.start()

    def vanish_node(self, node: Node | str) -> None:
        """It loses its power: all of it falls silent at once, and nobody is told. The Node object stays."""
        node = self._node(node)
        node.stop()
        for pod in node.pods:
            pod.lose()

    def return_node(self, node: Node | str) -> None:
        """A node that vanished is back; its pods have ended, and now it says so."""
        node = self._node(node)
        for pod in node.pods:
            pod.recover()
        node.start()

    def delete_node(self, node: Node | str) -> None:
        """It vanishes, and its Node object is deleted, as a cloud does."""
        node = self._node(node)
        self.vanish_node(node)
        node.delete_object()

    def _node(self, node: Node | str) -> Node:
        return self.nodes[node] if isinstance(node, str) else node


def _running(pod: Pod) -> list[Slot]:
    found = pod.running()
    if not found:
        raise LookupError(f"nothing of pod {pod.key[1]} runs")
    return found


def _freeze(pod: Pod) -> None:
    end_s = time.monotonic() + _LIMIT_S
    for slot in _running(pod):
        assert slot.container is not None
        slot.container.signal_all(signal.SIGSTOP)
        while not all(_state(pid) in "TtZX" for pid in _processes(slot)):
            if time.monotonic() > end_s:
                raise TimeoutError(f"pod {pod.key[1]} does not stand still")
            time.sleep(_LOOK_S)


def _processes(slot: Slot) -> dict[int, str]:
    assert slot.container is not None
    found = {}
    try:
        namespace = os.readlink(f"/proc/{slot.container.pid}/ns/pid")
    except OSError:
        return {}  # it has just ended
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "ns/pid") == namespace:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace").strip()
            except OSError:
                continue  # gone meanwhile
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
