"""Creating a job's objects so that all of them are there in the end, or none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ConflictError, UnreachableError

_ROLL_BACK_S = 20.0
_RETRY_S = 0.5


class Creation:
    """What was created so far, and how to be rid of it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._made: list[tuple[str, str, str | None]] = []

    @property
    def count(self) -> int:
        """How many objects may be there."""
        return len(self._made)

    def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Create one more object."""
        kind, name = str(manifest["kind"]), str(manifest["metadata"]["name"])
        # Entered before it is known to be there: cut off in between, nobody could tell.
        self._made.append((kind, name, None))
        try:
            created = self._cluster.create(manifest)
        except UnreachableError:
            raise
        except ClusterError:
            self._made.pop()  # the API server said no
            raise
        self._made[-1] = (kind, name, created["metadata"]["uid"])
        return created

    def give_to(self, owner: Mapping[str, Any]) -> None:
        """Have all others removed when `owner` is."""
        metadata = owner["metadata"]
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        for kind, name, uid in self._made:
            if uid != metadata["uid"]:
                self._cluster.patch(kind, name, {"metadata": {"uid": uid, "ownerReferences": [reference]}})

    def roll_back(self) -> list[str]:
        """Remove everything, the last first; what may still be there, because the API server does not answer
        or says no. Tries for 20 s."""
        deadline = time.monotonic() + _ROLL_BACK_S
        while self._made:
            kind, name, uid = self._made[-1]
            try:
                self._cluster.delete(kind, name, uid=uid)
            except ConflictError:
                pass  # another one has the name by now
            except UnreachableError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(_RETRY_S)
                continue
            except ClusterError:
                break
            self._made.pop()
        return [f"{kind} {name}" for kind, name, _ in reversed(self._made)]
