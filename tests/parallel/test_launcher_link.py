"""A launcher's link to a coordinator that goes away and comes back."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from ringps.config import Timeouts
from ringps.membership import (
    CoordinatorBack,
    CoordinatorLost,
    Expel,
    JobDone,
    JobEvent,
    LauncherLink,
    Replaceable,
)
from ringps.wire.control import LauncherHello, Refused, Waiting, WorkerExited
from tests.scripted import ScriptedCoordinator, assignment

TIMEOUTS = Timeouts(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.3)
_LIMIT_S = 20.0


class Launcher:
    """A registered link of three workers, 2 to 4 of 5, and what it tells its launcher."""

    def __init__(self, coordinator: ScriptedCoordinator, stack: ExitStack) -> None:
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.link = LauncherLink(coordinator.address, None, TIMEOUTS, self.told.put)
        stack.callback(self.link.close)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        registering = pool.submit(self.link.register, "here", "127.0.0.1", 3, 29500, False)
        self.hello = coordinator.assign(world_size=5, first_worker_id=2)
        assert registering.result(_LIMIT_S) == assignment(5, 2)

    def next(self) -> Any:
        return self.told.get(timeout=_LIMIT_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def exited(worker_id: int, pid: int = 7) -> WorkerExited:
    return WorkerExited(worker_id=worker_id, pid=pid, code=3, reason="process exited with code 3")


def report(launcher: Launcher, exited: WorkerExited) -> None:
    launcher.link.worker_exited(exited.worker_id, exited.pid, exited.code, exited.reason)


def test_words_on_workers_are_passed_on(stack: ExitStack) -> None:
    words = [
        Replaceable(worker_id=3, reason="process killed"),
        Expel(worker_id=4, pid=77, reason="no heartbeat"),
        JobEvent(event={"event": "generation"}),
        JobDone(),
    ]
    with ScriptedCoordinator() as coordinator:
        launcher = Launcher(coordinator, stack)
        for word in words:
            coordinator.say(word)
        assert [launcher.next() for _ in words] == words


def test_a_restarted_coordinator_learns_of_the_assignment_and_of_the_exits(stack: ExitStack) -> None:
    with ScriptedCoordinator() as first:
        launcher = Launcher(first, stack)
        assert (launcher.hello.first_worker_id, launcher.hello.world_size) == (None, None)
        report(launcher, exited(2))
        assert first.hear(WorkerExited) == exited(2)
    assert isinstance(launcher.next(), CoordinatorLost)
    report(launcher, exited(4))
    with ScriptedCoordinator(port=first.port) as second:
        hello = second.assign(world_size=5, first_worker_id=2)
        assert (hello.first_worker_id, hello.world_size) == (2, 5)
        assert (hello.session, hello.slots) == (launcher.hello.session, 3)
        heard = [second.hear(WorkerExited) for _ in range(2)]
        assert heard == [exited(2), exited(4)], "both the one that the first knew and the one it did not"
        assert launcher.next() == CoordinatorBack()
        second.say(JobDone())
        assert launcher.next() == JobDone(), "and it is said once that it is back"


def test_the_exit_of_a_replaced_process_is_not_reported_again(stack: ExitStack) -> None:
    with ScriptedCoordinator() as first:
        launcher = Launcher(first, stack)
        for worker_id in (2, 3):
            report(launcher, exited(worker_id))
            first.hear(WorkerExited)
        launcher.link.worker_started(2)
    with ScriptedCoordinator(port=first.port) as second:
        second.hear(LauncherHello)
        assert second.hear(WorkerExited) == exited(3)
        report(launcher, exited(4))
        assert second.hear(WorkerExited) == exited(4)


def test_a_coordinator_that_is_lost_again_is_lost_again(stack: ExitStack) -> None:
    with ScriptedCoordinator() as first:
        launcher = Launcher(first, stack)
    for _ in range(2):
        assert isinstance(launcher.next(), CoordinatorLost)
        with ScriptedCoordinator(port=first.port) as again:
            again.assign(world_size=5, first_worker_id=2)
            assert launcher.next() == CoordinatorBack()


def test_a_coordinator_that_refuses_us_is_not_back(stack: ExitStack) -> None:
    with ScriptedCoordinator() as first:
        launcher = Launcher(first, stack)
    assert isinstance(launcher.next(), CoordinatorLost)
    with ScriptedCoordinator(port=first.port) as second:
        second.hear(LauncherHello)
        second.say(Waiting(reason="a moment"))
        second.say(Refused(reason="another job"))
    with ScriptedCoordinator(port=first.port) as third:
        third.assign(world_size=5, first_worker_id=2)
        assert launcher.next() == CoordinatorBack()


def test_refused_at_once_it_counts_as_lost(stack: ExitStack) -> None:
    with ScriptedCoordinator() as coordinator:
        launcher = Launcher(coordinator, stack)
        coordinator.say(Refused(reason="another job"))
        lost = launcher.next()
    assert isinstance(lost, CoordinatorLost)
    assert "does not take us back: another job" in lost.reason


def test_a_coordinator_that_gives_us_other_workers_is_not_listened_to(stack: ExitStack) -> None:
    with ScriptedCoordinator() as first:
        launcher = Launcher(first, stack)
        first.say(assignment(5, 0))
        lost = launcher.next()
        assert isinstance(lost, CoordinatorLost)
        assert "knows our first worker as worker 0 of 5, while it is worker 2 of 5" in lost.reason
        first.say(Replaceable(worker_id=2, reason="not ours"))
        first.say(assignment(5, 2))
        assert launcher.next() == CoordinatorBack()
        first.say(JobDone())
        assert launcher.next() == JobDone()
