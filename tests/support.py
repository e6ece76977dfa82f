"""What a test asks of the machine it runs on."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest


def require(condition: bool, why: str) -> None:
    """Skip the running test unless `condition` holds, and say why.

    With RINGPS_TEST_NO_SKIP=1, as in CI, the test fails instead: there everything must run.
    """
    if condition:
        return
    if os.environ.get("RINGPS_TEST_NO_SKIP") == "1":
        pytest.fail(f"cannot run here: {why} (and RINGPS_TEST_NO_SKIP=1)")
    pytest.skip(why)


def free_pair() -> int:
    """A port that is free like the next one: a coordinator takes both, and its successor again."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = int(a.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                b.bind(("127.0.0.1", port + 1))
                return port
