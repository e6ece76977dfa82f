"""Options and fixtures of all tests."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable

import hypothesis
import pytest

# A busy machine is slow, and that is no failure.
hypothesis.settings.register_profile(
    "ringps", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ringps")

Golden = Callable[[str, str | bytes], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="record the golden files anew instead of comparing with them; read the diff afterwards",
    )


def pytest_configure() -> None:
    """Programs that tests start hear all signals, also where `nohup` or `&` made this process ignore some.

    A program inherits what is ignored, but no handler.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, content)` compares `content` with the file `name` in `golden/` beside the test."""

    def compare(name: str, content: str | bytes) -> None:
        path = request.path.parent / "golden" / name
        found = content.encode() if isinstance(content, str) else content
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(found)
            return
        if not path.exists():
            pytest.fail(f"there is no {path}; record it with --regenerate")
        recorded = path.read_bytes()
        if found != recorded:
            pytest.fail(f"{path} differs; if that is meant, --regenerate it\n{_difference(recorded, found)}")

    return compare


def _difference(recorded: bytes, found: bytes) -> str:
    try:
        before, after = recorded.decode().splitlines(), found.decode().splitlines()
    except UnicodeDecodeError:
        before, after = ([f"{len(content)} bytes"] for content in (recorded, found))
    return "\n".join(difflib.unified_diff(before, after, "recorded", "found", lineterm=""))
