"""What is said of failed requests: once when they begin to fail, and once when they are answered again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ringps_launcher.kubernetes.errors import ClusterError, UnreachableError


class Outages:
    """Shared by all who talk to the API server in one process. Thread-safe."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._unanswered: set[str] = set()
        self._said: dict[str, str] = {}

    def failed(self, who: str, error: ClusterError) -> None:
        """`who` was refused or not answered."""
        with self._lock:
            if isinstance(error, UnreachableError):
                news = not self._unanswered
                self._unanswered.add(who)
                words = f"{error}; training goes on, trying again"
            else:
                # Not by its words, which may have a version or a time in them.
                kind = type(error).__name__
                news, words = self._said.get(who) != kind, str(error)
                self._said[who] = kind
        if news:
            self._say(words)

    def worked(self, who: str) -> None:
        """`who` was answered."""
        with self._lock:
            back = self._unanswered == {who}
            self._unanswered.discard(who)
            self._said.pop(who, None)
        if back:
            self._say("the API server answers again")
