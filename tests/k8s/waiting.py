"""Waiting for what a cluster does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def eventually(look: Callable[[], Found], what: str, *, limit_s: float = 30.0, every_s: float = 0.1) -> Found:
    """What `look` finds, once it is truthy; an `AssertionError` with what it found last if it never is."""
    end = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}; found {found!r}"
        time.sleep(every_s)
    return found
