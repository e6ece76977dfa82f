"""A pod on its node: a thread that brings what runs to what the API server wants, and reports how it is."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.k8s.kubelet import images, launching, probe, status, volumes
from tests.k8s.kubelet.admission import refusal
from tests.k8s.kubelet.api import ApiError
from tests.k8s.kubelet.container import Container
from tests.k8s.kubelet.environment import ConfigError, Facts
from tests.k8s.kubelet.network import Attachment
from tests.k8s.kubelet.reports import Report
from tests.k8s.kubelet.slot import Slot
from tests.k8s.kubelet.status import FINAL, Run, Verdict
from tests.k8s.kubelet.surroundings import Surroundings

Object = dict[str, Any]
_AGAIN_S = 0.5


class Pod:
    """Lives until the API server has no such pod any more and nothing of it runs."""

    def __init__(self, pod: Object, around: Surroundings) -> None:
        self.object = pod
        self.uid: str = pod["metadata"]["uid"]
        self.key: tuple[str, str] = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        self.admitted = False
        self.over = False
        """Whether it has ended for good: its phase is final and nothing of it runs."""
        self.slots = [Slot(spec) for spec in pod["spec"]["containers"]]
        self._around = around
        self._directory = around.directory / "pods" / self.uid
        self._started_at_s = time.time()
        self._attachment: Attachment | None = None
        self._sources: dict[str, volumes.Source] | None = None
        self._verdict: Verdict | None = None
        self._eviction_grace_s: float | None = None
        self._removed = False
        self._killing_since_s: float | None = None
        self._grace_s = 0.0
        self._reported: Object | None = None
        self._deleted = False
        self._mount_problem = ""
        self._changed = threading.Condition()
        self._poked = True
        self._halted = False
        self._closed = False
        self._stepping = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="kubelet-pod", daemon=True)
        # What an earlier life of the node has reported is final.
        if (pod.get("status") or {}).get("phase") in FINAL:
            self.over = True

    def start(self) -> None:
        self._thread.start()

    def update(self, pod: Object, *, removed: bool = False) -> None:
        """The API server has another version of it, or with `removed` has it no more."""
        with self._changed:
            self.object = pod
            self._removed = self._removed or removed
            if self._reported is not None and _ready(pod.get("status") or {}) != _ready(self._reported):
                self._reported = None  # somebody else wrote what is ours to say: say it again
            self._poke()

    def evict(self, message: str, grace_s: float) -> None:
        """End it as a kubelet does that is short of something."""
        with self._changed:
            self._verdict = Verdict(reason="Evicted", message=message, disruption=True)
            self._eviction_grace_s = grace_s
            self._poke()
        self._around.reporter.event(self.object, "Warning", "Evicted", message)

    def running(self) -> list[Slot]:
        return [
            s for s in self.slots if s.container is not None and s.container.pid and not s.container.ended
        ]

    @property
    def address(self) -> str | None:
        return None if self._attachment is None else self._attachment.address

    def volume(self, name: str) -> Path:
        """Where on this machine a volume lies. Raises `LookupError`."""
        source = (self._sources or {}).get(name)
        if source is None or source.path is None:
            raise LookupError(f"pod {self.key[1]} has no volume {name} with a path")
        return source.path

    def halt(self, halted: bool) -> None:
        """While halted, nobody acts on the pod or watches over it. Returns when that is so."""
        with self._stepping, self._changed:
            self._halted = halted
            for slot in self.slots:
                if slot.prober is not None:
                    slot.prober.held = halted
            self._poke()

    def lose(self) -> None:
        """Its node has no power: connections fall silent, processes are no more. Call `halt` before."""
        if self._attachment is not None:
            self._attachment.unplug()
        for slot in self.slots:
            if slot.container is not None:
                slot.container.close()

    def recover(self) -> None:
        """The node is back: what ran has ended in a way that nobody saw. Still halted."""
        with self._stepping:
            for slot in self.slots:
                if slot.container is not None:
                    self._collect(slot, lost=True)
            self._free_network()
            self._sources = None
            self._reported = None
            self._deleted = False

    def close(self) -> None:
        """Kill all of it, and say nothing more."""
        with self._changed:
            self._closed = True
            self._poke()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for slot in self.slots:
            if slot.prober is not None:
                slot.prober.close()
            if slot.container is not None:
                slot.container.close()
        self._free_network()

    def log(self, container: str, previous: bool) -> tuple[Path, Callable[[], bool]]:
        """The log of a container's latest run or of the one before. Raises `LookupError`."""
        slot = next((s for s in self.slots if s.spec["name"] == container), None)
        if slot is None:
            raise LookupError(f'container "{container}" in pod "{self.key[1]}" is not available')
        backing_off = slot.container is None and slot.waiting is not None and slot.ended is not None
        number = slot.restarts - (1 if previous and not backing_off else 0)
        if number < 0:
            raise LookupError(f'previous terminated container "{container}" in pod "{self.key[1]}" not found')
        path = self._log_path(slot, number)
        if not path.exists() and not (slot.container is not None and not previous):
            waiting = slot.waiting[0] if slot.waiting else "ContainerCreating"
            raise LookupError(
                f'container "{container}" in pod "{self.key[1]}" is waiting to start: {waiting}'
            )

        def over() -> bool:
            current = slot.container
            return current is None or current.log != path or current.ended is not None

        return path, over

    # The thread.

    def _run(self) -> None:
        delay_s: float | None = 0.0
        while True:
            with self._changed:
                until_s = None if delay_s is None else time.monotonic() + delay_s
                while not self._poked and not self._closed:
                    left_s = None if until_s is None else until_s - time.monotonic()
                    if left_s is not None and left_s <= 0:
                        break
                    self._changed.wait(left_s)
                self._poked = False
                if self._closed:
                    return
            with self._stepping:
                if self._halted:
                    delay_s = None
                    continue
                delay_s = self._step()
            if self._removed and all(slot.container is None for slot in self.slots):
                self._vanish_from_here()
                return

    def _poke(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify()

    def _step(self) -> float | None:
        """Do what can be done now; after how many seconds there is more to do."""
        for slot in self.slots:
            if slot.container is not None and slot.container.ended is not None:
                self._collect(slot)
        delay_s = None
        if not self.over:
            if self._ending:
                delay_s = self._end()
            elif not self.admitted and not self._admit():
                pass
            else:
                delay_s = self._advance()
        self._watch_readiness()
        self._report()
        return delay_s

    @property
    def _ending(self) -> bool:
        asked = "deletionTimestamp" in self.object["metadata"] or self._removed
        # While it runs here, only somebody else can have called it final; then it must not run on.
        declared = (self.object.get("status") or {}).get("phase") in FINAL
        return asked or declared or self._verdict is not None

    def _admit(self) -> bool:
        with self._around.admission:
            refused = refusal(self.object, self._around.neighbours(), self._around.allocatable)
            self.admitted = refused is None
        if refused is not None:
            self._verdict = Verdict(reason=refused[0], message=f"Pod was rejected: {refused[1]}")
            self._around.reporter.event(self.object, "Warning", refused[0], refused[1])
        return self.admitted

    def _end(self) -> float | None:
        running = [slot for slot in self.slots if slot.container is not None]
        now_s = time.monotonic()
        if self._killing_since_s is None:
            self._killing_since_s = now_s
        for slot in running:
            assert slot.container is not None
            if not slot.asked_to_end:
                slot.asked_to_end = True
                slot.container.signal(signal.SIGTERM)
                text = f"Stopping container {slot.spec['name']}"
                self._around.reporter.event(self.object, "Normal", "Killing", text)
        if not running:
            return None
        self._grace_s = self._effective_grace_s()
        left_s = self._killing_since_s + self._grace_s - now_s
        if left_s > 0:
            return left_s
        for slot in running:
            assert slot.container is not None
            slot.container.kill()
        return None  # its end will poke

    def _effective_grace_s(self) -> float:
        """The shortest that was asked for, and never less than a second."""
        wanted = [
            self.object["metadata"].get("deletionGracePeriodSeconds"),
            self._eviction_grace_s,
            self._grace_s or None,
        ]
        asked = [float(grace) for grace in wanted if grace is not None]
        spec = self.object["spec"].get("terminationGracePeriodSeconds", 30)
        return max(1.0, min(asked) if asked else float(spec))

    def _advance(self) -> float | None:
        """Set up what is lacking, and start what should run."""
        try:
            if self._attachment is None:
                self._attachment = self._around.network.join()
            if self._sources is None:
                made = volumes.Volumes(
                    self._around.api, self.object, self._directory / "volumes", self._facts()
                )
                self._sources = made.set_up()
        except (volumes.VolumeError, ApiError, OSError) as error:
            text = f"MountVolume.SetUp failed: {error}"
            if text != self._mount_problem:
                self._mount_problem = text
                self._around.reporter.event(self.object, "Warning", "FailedMount", text)
            return _AGAIN_S
        policy = self.object["spec"].get("restartPolicy", "Always")
        delays = []
        for slot in self.slots:
            again = slot.ended is not None and status.restarts(policy, slot.ended.code)
            if slot.container is not None or (slot.ended is not None and not again):
                continue
            left_s = slot.not_before_s - time.monotonic()
            if left_s > 0:
                delays.append(left_s)
            elif not self._start(slot):
                delays.append(max(0.05, slot.not_before_s - time.monotonic()))
        return min(delays, default=None)

    def _start(self, slot: Slot) -> bool:
        """Whether it starts; if not, it may be tried again at `slot.not_before_s`."""
        assert self._attachment is not None and self._sources is not None
        log = self._log_path(slot, slot.restarts + (slot.ended is not None))
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            launch = launching.plan(
                self.object,
                slot.spec,
                around=self._around,
                facts=self._facts(),
                attachment=self._attachment,
                sources=self._sources,
                log=log,
            )
        except ApiError:
            slot.not_before_s = time.monotonic() + _AGAIN_S
            return False
        except launching.NoImageError:
            self._cannot(slot, *images.missing(slot.spec, slot.attempts))
            return False
        except (ConfigError, volumes.VolumeError) as error:
            self._cannot(slot, "CreateContainerConfigError", str(error))
            return False
        slot.attempts = 0
        if slot.ended is not None:
            slot.before, slot.ended = slot.ended, None
            slot.restarts += 1
        slot.asked_to_end = slot.out_of_memory = False
        slot.container = Container(launch, self._poke)
        slot.id = slot.container.id
        return True

    def _cannot(self, slot: Slot, reason: str, text: str) -> None:
        if slot.waiting != (reason, text):
            self._around.reporter.event(self.object, "Warning", "Failed", f"Error: {reason}: {text}")
        slot.waiting = (reason, text)
        slot.not_before_s = time.monotonic() + status.backoff_s(slot.attempts // 2)
        slot.attempts += 1

    def _collect(self, slot: Slot, *, lost: bool = False) -> None:
        """A container has ended."""
        container = slot.container
        assert container is not None
        if slot.prober is not None:
            slot.prober.close()
            slot.prober = None
        container.close()
        ended = container.ended
        assert ended is not None
        code, reason, text = ended.code, "Completed" if ended.code == 0 else "Error", ended.problem
        if lost:
            code, reason = 255, "Unknown"
        elif slot.out_of_memory and ended.signal == signal.SIGKILL:
            reason = "OOMKilled"
        elif ended.problem:
            reason = "StartError"
            text = f"failed to create containerd task: {ended.problem}"
        slot.ended = Run(
            code=code,
            reason=reason,
            started_at_s=container.started_at_s,
            ended_at_s=ended.at_s,
            id=container.id,
            message=text,
        )
        slot.container = None
        slot.waiting = None
        with contextlib.suppress(OSError):
            (container.log.parent / "root").rmdir()
        policy = self.object["spec"].get("restartPolicy", "Always")
        if status.restarts(policy, code) and not self._ending:
            delay_s = status.backoff_s(slot.restarts)
            slot.not_before_s = time.monotonic() + delay_s
            text = f"back-off {delay_s:g}s restarting failed container={slot.spec['name']} pod={self.key[1]}"
            slot.waiting = ("CrashLoopBackOff", text)
            self._around.reporter.event(self.object, "Warning", "BackOff", text)

    def _watch_readiness(self) -> None:
        for slot in self.running():
            wanted = slot.spec.get("readinessProbe")
            if wanted and probe.supported(wanted) and slot.prober is None:
                assert slot.container is not None and self._attachment is not None
                slot.prober = probe.Prober(wanted, slot.spec, slot.container, self._attachment, self._poke)

    def _report(self) -> None:
        if self._removed or (self._reported is not None and any(slot.starting for slot in self.slots)):
            return
        asked = "deletionTimestamp" in self.object["metadata"]
        if not self.over:
            found = status.status(
                self.object,
                [slot.view() for slot in self.slots],
                now_s=time.time(),
                started_at_s=self._started_at_s,
                host_ip=self._around.host_ip,
                pod_ip=self.address,
                ending=self._ending,
                verdict=self._verdict,
            )
            if found["phase"] in FINAL and all(slot.container is None for slot in self.slots):
                self.over = True
                self._free_network()
            news = _differs(found, self._reported)
            self._reported = found
        else:
            news = False
        delete = asked and self.over and not self._deleted
        if news or delete:
            self._deleted = delete
            known = self._reported or {"phase": self.object["status"]["phase"]}
            self._around.reporter.send(Report(self.object, known, delete, self._arrived))

    def _arrived(self, report: Report, there: bool) -> None:
        if not there:
            self.update(self.object, removed=True)

    def _vanish_from_here(self) -> None:
        self._around.reporter.forget(self.uid)
        self._free_network()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._around.gone(self.uid)

    def _free_network(self) -> None:
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None

    def _facts(self) -> Facts:
        around = self._around
        return Facts(
            self.object,
            node=around.node,
            host_ip=around.host_ip,
            pod_ip=self.address or "",
            allocatable=around.allocatable,
        )

    def _log_path(self, slot: Slot, number: int) -> Path:
        return self._directory / "containers" / str(slot.spec["name"]) / f"{number}.log"


def _differs(new: Object, old: Object | None) -> bool:
    """Whether there is something to tell besides times of transitions."""
    return old is None or _timeless(new) != _timeless(old)


def _timeless(found: Object) -> Object:
    conditions = [
        {name: value for name, value in condition.items() if name != "lastTransitionTime"}
        for condition in found["conditions"]
    ]
    return {**found, "conditions": conditions}


def _ready(found: Object) -> dict[str, str]:
    """What a status says of whether the pod serves. (When a node is away, the control plane says no.)"""
    conditions = found.get("conditions") or ()
    return {one["type"]: one["status"] for one in conditions if one["type"] in ("Ready", "ContainersReady")}
