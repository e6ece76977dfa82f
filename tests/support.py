"""What a test asks of the machine it runs on."""

from __future__ import annotations

import os

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
