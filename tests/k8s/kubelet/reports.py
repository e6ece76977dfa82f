"""What a node says of its pods: statuses and deletions until they arrive, events if they do."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.k8s.kubelet import status
from tests.k8s.kubelet.api import STRATEGIC, Api, ApiError

Object = dict[str, Any]
_AGAIN_S = 0.3
_EVENTS_KEPT = 100


@dataclass(frozen=True)
class Report:
    """The status of a pod; with `delete`, the pod object goes once the API server has that."""

    pod: Object
    status: Object
    delete: bool
    done: Callable[[Report, bool], None]
    """Called from the reporter's thread: True when the API server has it, False when there is no such pod."""


class Reporter:
    """Sends from a thread of its own; of each pod the newest status only, until it has arrived."""

    def __init__(self, api: Api, node: str) -> None:
        self._api = api
        self._node = node
        self._reports: dict[str, Report] = {}
        self._events: deque[Object] = deque(maxlen=_EVENTS_KEPT)
        self._changed = threading.Condition()
        self._complaints: set[str] = set()
        self._closed = False
        self._held = False
        self._thread = threading.Thread(target=self._run, name="kubelet-reporter", daemon=True)
        self._thread.start()

    def send(self, report: Report) -> None:
        with self._changed:
            self._reports[report.pod["metadata"]["uid"]] = report
            self._changed.notify()

    def forget(self, uid: str) -> None:
        with self._changed:
            self._reports.pop(uid, None)

    def event(self, pod: Object, kind: str, reason: str, message: str) -> None:
        """Have an event recorded, if the API server is there; nobody waits for it."""
        with self._changed:
            self._events.append(self._event(pod, kind, reason, message))
            self._changed.notify()

    def hold(self, held: bool) -> None:
        """While held, nothing is sent."""
        with self._changed:
            self._held = held
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (self._held or not (self._reports or self._events)):
                    self._changed.wait()
                if self._closed:
                    return
                reports = list(self._reports.items())
                event = self._events.popleft() if self._events and not reports else None
            failed = False
            for uid, report in reports:
                try:
                    arrived = self._send(report)
                except ApiError as error:
                    failed = True  # away, or not able just now
                    self._complain(error)
                    continue
                with self._changed:
                    if self._reports.get(uid) is report:
                        del self._reports[uid]
                report.done(report, arrived)
            if event is not None:
                try:
                    self._api.post(f"/api/v1/namespaces/{event['metadata']['namespace']}/events", event)
                except ApiError:
                    pass
            if failed:
                with self._changed:
                    if not self._closed:
                        self._changed.wait(_AGAIN_S)

    def _complain(self, error: ApiError) -> None:
        """A status that is not valid will never be: say so where a failed test shows it."""
        if error.code in (400, 422) and str(error) not in self._complaints:
            self._complaints.add(str(error))
            print(f"node {self._node}: {error}", file=sys.stderr)

    def _send(self, report: Report) -> bool:
        about = report.pod["metadata"]
        path = f"/api/v1/namespaces/{about['namespace']}/pods/{about['name']}"
        body = {"metadata": {"uid": about["uid"]}, "status": report.status}
        try:
            self._api.patch(f"{path}/status", body, STRATEGIC)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            if error.code == 409 and "uid" not in str(error).lower():
                raise
            return False
        if report.delete:
            self._api.delete(path, about["uid"])
        return True

    def _event(self, pod: Object, kind: str, reason: str, message: str) -> Object:
        about = pod["metadata"]
        now_s = time.time()
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about['name']}.{time.time_ns():x}", "namespace": about["namespace"]},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": about["name"],
                "namespace": about["namespace"],
                "uid": about["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self._node},
            "reportingComponent": "kubelet",
            "reportingInstance": self._node,
            "firstTimestamp": status.timestamp(now_s),
            "lastTimestamp": status.timestamp(now_s),
            "count": 1,
        }
