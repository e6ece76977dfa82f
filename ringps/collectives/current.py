"""The communicator of this process, for code that is not handed one."""

from __future__ import annotations

from ringps.collectives.communicator import Communicator
from ringps.errors import ClosedError

_current: Communicator | None = None


def use(communicator: Communicator | None) -> None:
    """Make `communicator` the one that `current` returns."""
    global _current
    _current = communicator


def current() -> Communicator:
    """This process's communicator.

    Raises:
        ClosedError: `ringps.init()` has not been called, or `ringps.shutdown()` has.
    """
    if _current is None:
        raise ClosedError("no ring: call ringps.init() first (and not after ringps.shutdown())")
    return _current
