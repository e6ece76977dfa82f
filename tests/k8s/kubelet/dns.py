"""The cluster's DNS server: keeps the zone as the API server has it, and what it knows while that is away."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from tests.k8s.kubelet import zone
from tests.k8s.kubelet.api import Api, Follower

Object = dict[str, Any]

_SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
_SERVICES = "/api/v1/services"


class Dns:
    """Answers on `listening`, a UDP socket, until it is closed."""

    def __init__(self, api: Api, listening: socket.socket) -> None:
        self._listening = listening
        self._lock = threading.Lock()
        self._closed = False
        self._objects: dict[str, dict[str, Object]] = {_SLICES: {}, _SERVICES: {}}
        self._zone: zone.Zone = {}
        self._followers = [
            Follower(
                api,
                path,
                listed=lambda items, path=path: self._listed(path, items),
                changed=lambda kind, found, path=path: self._changed(path, kind, found),
            )
            for path in self._objects
        ]
        self._thread = threading.Thread(target=self._serve, name="kubelet-dns", daemon=True)
        self._thread.start()

    def close(self) -> None:
        for follower in self._followers:
            follower.close()
        self._closed = True
        with contextlib.suppress(OSError):  # not connected, it says; but who waits for a packet is woken
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while not self._closed:
            try:
                packet, sender = self._listening.recvfrom(4096)
                response = zone.answer(packet, self._zone)
                if response is not None:
                    self._listening.sendto(response, sender)
            except OSError:
                continue  # whoever asked is gone

    def _listed(self, path: str, items: list[Object]) -> None:
        with self._lock:
            self._objects[path] = {item["metadata"]["uid"]: item for item in items}
            self._rebuild()

    def _changed(self, path: str, kind: str, found: Object) -> None:
        with self._lock:
            if kind == "DELETED":
                self._objects[path].pop(found["metadata"]["uid"], None)
            else:
                self._objects[path][found["metadata"]["uid"]] = found
            self._rebuild()

    def _rebuild(self) -> None:
        self._zone = zone.zone(self._objects[_SERVICES].values(), self._objects[_SLICES].values())
