"""What a node gives to the pods on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.k8s.kubelet.api import Api
from tests.k8s.kubelet.images import Image
from tests.k8s.kubelet.network import Network
from tests.k8s.kubelet.reports import Reporter

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The same for all pods of a node."""

    node: str
    host_ip: str
    allocatable: Mapping[str, str]
    api: Api
    reporter: Reporter
    network: Network
    images: Mapping[str, Image]
    directory: Path
    dns: str
    services: Mapping[str, str]
    """Variables that name the API server."""
    admission: threading.Lock
    neighbours: Callable[[], list[Object]]
    """The pods that were admitted and have not ended."""
    gone: Callable[[str], None]
    """Called with the uid of a pod of which nothing is left."""
