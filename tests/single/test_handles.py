"""Handles of collectives that are made of others, and gates."""

from __future__ import annotations

import threading

import pytest

from ringps.collectives.device.way import DeviceHandle, Pending, look_at
from ringps.collectives.gate import Gate
from ringps.collectives.handle import Handle
from ringps.errors import ClosedError, CollectiveError
from ringps.testing.pretend import PretendStream


def test_a_whole_is_done_when_its_parts_are_and_it_is_itself() -> None:
    parts = [Handle("one"), Handle("other")]
    whole = Handle("whole", parts)
    whole._settle()
    assert not whole.done()
    parts[0]._settle()
    with pytest.raises(TimeoutError, match="other has not ended"):
        whole.wait(0.01)
    parts[1]._settle()
    assert whole.done()
    whole.wait()


def test_a_whole_fails_with_its_first_part_that_does() -> None:
    parts = [Handle("one"), Handle("other")]
    whole = Handle("whole", parts)
    parts[0]._settle(ClosedError("for a test"))
    assert whole.done()
    assert whole.failed
    with pytest.raises(ClosedError, match="for a test"):
        whole.wait()


def test_a_gate_opens_at_the_last_step_and_calls_once() -> None:
    gate, calls = Gate(2), []
    gate.on_open(lambda: calls.append("before"))
    gate.step()
    assert not gate.is_open
    assert calls == []
    gate.step()
    assert gate.is_open
    gate.on_open(lambda: calls.append("after"))
    gate.step()
    assert calls == ["before", "after"]


def test_pending_handles_are_ended_once() -> None:
    pending, ended, open_ = Pending(), Handle("ended"), Handle("open")
    pending.add(ended)
    pending.add(open_)
    pending.settle(ended)
    pending.fail(ClosedError("the first"))
    pending.fail(ClosedError("the second"))
    pending.settle(open_)
    ended.wait()
    with pytest.raises(ClosedError, match="the first"):
        open_.wait()
    with pytest.raises(ClosedError, match="the first"):
        pending.add(Handle("late"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_notices_that_the_gpu_has_failed() -> None:
    """Nothing that was put in is ever done then, so nobody would end the handle."""
    stream = PretendStream("failing")
    handle = DeviceHandle("all_reduce", (), lambda: look_at(stream))
    begun = threading.Event()

    def fail() -> None:
        begun.set()
        raise RuntimeError("an illegal memory access was encountered")

    stream.run(fail)
    begun.wait(20)
    with pytest.raises(CollectiveError, match=r"the GPU has failed.*illegal memory access.*start this"):
        handle.wait(20)
