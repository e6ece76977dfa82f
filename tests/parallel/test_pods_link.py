"""The link of a launcher that has a place of its own: a pod's."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from ringps.config import Timeouts
from ringps.membership import Evict, JobDone, JobEnded, JobFailed, LauncherLink
from ringps.wire.control import LauncherHello, Refused, Waiting
from tests.scripted import ScriptedCoordinator, assignment

TIMEOUTS = Timeouts(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.3)
_LIMIT_S = 20.0
FAILED = JobFailed(worker_id=0, rank=0, host="pod-0", code=3, reason="why", restarts=False)


class Pod:
    """A link of worker 1 of 3, which registers on a thread of its own."""

    def __init__(self, coordinator: ScriptedCoordinator, stack: ExitStack) -> None:
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.link = LauncherLink(coordinator.address, None, TIMEOUTS, self.told.put, place=1)
        stack.callback(self.link.close)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        self.registering = pool.submit(self.link.register, "pod-1", "127.0.0.1", 1, 29500, False)

    def assigned(self, coordinator: ScriptedCoordinator) -> LauncherHello:
        hello = coordinator.assign(world_size=3, first_worker_id=1)
        assert self.registering.result(_LIMIT_S) == assignment(3, 1)
        return hello

    def next(self) -> Any:
        return self.told.get(timeout=_LIMIT_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_it_says_which_place_it_has(stack: ExitStack) -> None:
    with ScriptedCoordinator() as coordinator:
        hello = Pod(coordinator, stack).assigned(coordinator)
        assert (hello.place, hello.first_worker_id) == (1, None)


@pytest.mark.parametrize("verdict", [JobDone(), JobDone(suspended=True), FAILED])
def test_one_that_comes_after_the_end_hears_of_it(stack: ExitStack, verdict: JobDone | JobFailed) -> None:
    with ScriptedCoordinator() as coordinator:
        pod = Pod(coordinator, stack)
        coordinator.hear(LauncherHello)
        coordinator.say(Waiting(reason="the ring is about to end"))
        coordinator.say(verdict)
        with pytest.raises(JobEnded) as raised:
            pod.registering.result(_LIMIT_S)
        assert raised.value.verdict == verdict


def test_one_that_is_to_leave_is_asked(stack: ExitStack) -> None:
    with ScriptedCoordinator() as coordinator:
        pod = Pod(coordinator, stack)
        pod.assigned(coordinator)
        coordinator.say(Evict(worker_id=1, reason="preempted"))
        assert pod.next() == Evict(worker_id=1, reason="preempted")


def test_one_that_is_not_taken_back_starts_anew(stack: ExitStack) -> None:
    """Elsewhere its workers would go on without a coordinator."""
    with ScriptedCoordinator() as coordinator:
        pod = Pod(coordinator, stack)
        pod.assigned(coordinator)
        coordinator.say(Refused(reason="start anew"))
        failed = pod.next()
        assert isinstance(failed, JobFailed) and failed.restarts
        assert failed.reason == "the coordinator does not take us back: start anew"
        coordinator.say(FAILED)
        coordinator.say(Evict(worker_id=1, reason="a word that comes after"))
        assert isinstance(pod.next(), Evict)  # how this start ended is said once


def test_waiting_again_changes_nothing(stack: ExitStack) -> None:
    """A coordinator that was restarted may have another pod in its place for now."""
    with ScriptedCoordinator() as coordinator:
        pod = Pod(coordinator, stack)
        pod.assigned(coordinator)
        coordinator.say(Waiting(reason="worker 1 on pod-1b has this place still"))
        coordinator.say(JobDone())
        assert pod.next() == JobDone()
