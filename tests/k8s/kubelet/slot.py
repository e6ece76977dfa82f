"""A container of a pod's spec, and what has become of it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.k8s.kubelet import probe
from tests.k8s.kubelet.container import Container
from tests.k8s.kubelet.status import Run, View


@dataclass
class Slot:
    """Changed by the thread of its pod only."""

    spec: Mapping[str, Any]
    container: Container | None = None
    prober: probe.Prober | None = None
    waiting: tuple[str, str] | None = ("ContainerCreating", "")
    ended: Run | None = None
    before: Run | None = None
    restarts: int = 0
    attempts: int = 0
    """How often it could not be made."""
    not_before_s: float = 0.0
    """When it may be tried again (monotonic time)."""
    asked_to_end: bool = False
    out_of_memory: bool = False
    id: str = ""

    @property
    def starting(self) -> bool:
        return self.container is not None and self.container.pid is None and self.container.ended is None

    def view(self) -> View:
        container = self.container
        runs = container is not None and container.pid is not None
        ready = runs and (self.prober is None or self.prober.ready)
        return View(
            name=self.spec["name"],
            image=self.spec["image"],
            waiting=None if runs else self.waiting,
            running_since_s=container.started_at_s if container is not None and runs else None,
            ended=self.ended,
            before=self.before,
            ready=ready,
            restarts=self.restarts,
            id=self.id,
        )
