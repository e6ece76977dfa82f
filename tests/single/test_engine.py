"""Who drives the engine, and what that must not change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringps import probe
from ringps.collectives import Communicator
from ringps.collectives.backend import Work
from ringps.collectives.gate import Gate
from ringps.config import Config, Exchange
from ringps.errors import CollectiveError, PeerLostError
from ringps.testing import MemoryRing, run_ring
from ringps.wire.header import decode
from tests.rings import RINGS, small_chunks

CONFIG = Config()


def background_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ringps-comm"]


def together(*work: Callable[[], object]) -> list[BaseException]:
    """Run each on a thread of its own; what they raised."""
    raised: list[BaseException] = []

    def run(one: Callable[[], object]) -> None:
        try:
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("name", RINGS)
def test_who_waits_does_the_work_without_another_thread(name: str) -> None:
    def work(ring: Communicator) -> None:
        for size in (1, 1000, 300_000):
            tensor = torch.ones(size)
            ring.all_reduce(tensor)
            assert torch.equal(tensor, torch.full((size,), 3.0))
        assert not background_threads()

    run_ring(3, work, CONFIG, transports=RINGS[name](3, CONFIG))


def test_what_is_asynchronous_needs_one_thread_that_sleeps_between_calls() -> None:
    with MemoryRing(2, CONFIG) as ring:
        for _ in range(3):
            handles = [comm.all_reduce(torch.ones(5), async_op=True) for comm in ring.communicators]
            for handle in handles:
                handle.wait(20)
            assert len(background_threads()) == 2
        waits = threading.Event()
        for backend in ring._backends:
            assert backend._engine is not None
            backend._engine._transport.wait = lambda *_, **__: waits.set()  # type: ignore[method-assign]
        assert not waits.wait(0.1), "it watches idle links"
    assert not background_threads()


@pytest.mark.parametrize("name", ["loopback", "tcp"])
def test_synchronous_and_asynchronous_calls_take_turns(name: str) -> None:
    def work(ring: Communicator) -> None:
        for round_ in range(30):
            first, second = torch.full((5000,), 1.0), torch.full((round_ + 1,), 2.0)
            handle = ring.all_reduce(first, async_op=True)
            ring.all_reduce(second)
            handle.wait(20)
            ring.barrier()
            assert torch.equal(first, torch.full((5000,), 3.0))
            assert torch.equal(second, torch.full((round_ + 1,), 6.0))

    config = small_chunks(1024)
    run_ring(3, work, config, transports=RINGS[name](3, config))


def test_threads_of_one_rank_may_call_at_once() -> None:
    with MemoryRing(2, CONFIG) as ring:
        tensors = [[torch.ones(1000) for _ in range(20)] for _ in range(4)]

        def calls(rank: int, mine: list[torch.Tensor]) -> Callable[[], object]:
            return lambda: [ring.communicators[rank].all_reduce(tensor) for tensor in mine]

        raised = together(*(calls(number % 2, mine) for number, mine in enumerate(tensors)))
        assert not raised
        for mine in tensors:
            assert all(torch.equal(tensor, torch.full((1000,), 2.0)) for tensor in mine)


@pytest.mark.parametrize("name", RINGS)
def test_a_failure_ends_a_call_that_drives(name: str) -> None:
    with MemoryRing(2, CONFIG, transports=RINGS[name](2, CONFIG)) as ring:
        ready = threading.Event()

        def lose() -> None:
            ready.wait(20)
            ring.lose(1, "process exited by signal 9")

        def call() -> None:
            ready.set()
            ring.communicators[0].all_reduce(torch.ones(3))

        raised = together(call, lose)
        assert len(raised) == 1
        assert isinstance(raised[0], PeerLostError)
        with pytest.raises(PeerLostError):
            ring.communicators[0].barrier()


def test_a_call_that_is_interrupted_breaks_the_ring_and_not_the_process() -> None:
    class Stop(BaseException):
        pass

    def interrupt(*_: object, **__: object) -> None:
        raise Stop

    with MemoryRing(2, CONFIG) as ring:
        engine = ring._backends[0]._engine
        assert engine is not None
        engine._transport.wait = interrupt  # type: ignore[method-assign]
        with pytest.raises(Stop):
            ring.communicators[0].all_reduce(torch.ones(3))
        with pytest.raises(Exception, match="interrupted"):
            ring.communicators[0].all_reduce(torch.ones(3))


def test_a_result_that_cannot_be_handed_back_is_an_error_of_that_call() -> None:
    with MemoryRing(1, CONFIG) as ring:
        ring.communicators[0].all_reduce(torch.ones(3))
    with MemoryRing(2, CONFIG) as ring:
        engine = ring._backends[0]._engine
        assert engine is not None
        engine._complete = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(CollectiveError, match="division by zero"):
            ring.communicators[0].all_reduce(torch.ones(3))


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_have_the_same_bits_also_of_nans_and_overflows(world_size: int, dtype: torch.dtype) -> None:
    """Which NaN a sum of two NaNs is depends on their order. And overflows are no warnings."""

    def work(ring: Communicator) -> list[int]:
        signs = [1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
        tensor = torch.full((64,), 3e38 * signs[ring.rank], dtype=dtype)
        tensor[::2] = torch.copysign(torch.tensor(float("nan")), torch.tensor(signs[ring.rank]))
        tensor[3] = 3e38
        ring.all_reduce(tensor)
        assert tensor[3].isinf() and tensor[2].isnan()
        return tensor.view(torch.int32 if dtype is torch.float32 else torch.int16).tolist()

    results = run_ring(world_size, work)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name", ["loopback", "tcp", "zmq"])
@pytest.mark.parametrize("numel", [15, 16, 17])
def test_up_to_a_size_a_tensor_takes_few_steps(name: str, numel: int) -> None:
    config = Config(exchange=Exchange(doubling_bytes=64))

    def work(ring: Communicator) -> int:
        tensor = torch.arange(float(numel))
        ring.all_reduce(tensor)
        assert torch.equal(tensor, 4 * torch.arange(float(numel)))
        statistics = ring.statistics().transport
        assert statistics is not None
        return statistics.frames_sent

    sent = run_ring(4, work, config, transports=RINGS[name](4, config))
    assert sent == [2 if numel <= 16 and name != "zmq" else 6] * 4


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_payload_that_changed_on_its_way_breaks_the_link(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, changed = threading.Lock(), []

    def listen(point: str, passed: dict[str, Any]) -> None:
        with lock:
            if point == "chunk" and passed["payload"].nbytes and not changed:
                garbled = bytearray(passed["payload"])
                garbled[0] ^= 1
                passed["payload"] = memoryview(garbled)
                changed.append(point)

    monkeypatch.setattr(probe, "listener", listen)
    with pytest.raises(PeerLostError, match="wrong checksum"):
        run_ring(3, lambda ring: ring.all_reduce(torch.ones(size)), transports=RINGS["tcp"](3, CONFIG))
    assert changed


def test_payloads_above_the_limit_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def listen(point: str, passed: dict[str, Any]) -> None:
        header = decode(passed["header"])
        seen.add((header.payload_bytes, header.payload_check > 0))

    monkeypatch.setattr(probe, "listener", listen)
    config = Config(exchange=Exchange(checked_bytes=400, doubling_bytes=0))
    for size in (200, 202):
        run_ring(
            2, lambda ring, n=size: ring.all_reduce(torch.ones(n)), config, transports=RINGS["tcp"](2, config)
        )
    assert {(400, True), (404, False)} <= seen


def gated(tensor: torch.Tensor, gate: Gate, label: str = "") -> Work:
    """An all_reduce in place that begins when its gate is open."""
    return Work(
        kind="all_reduce",
        source=tensor,
        output=tensor,
        op="sum",
        src=0,
        label=label,
        shape=tuple(tensor.shape),
        dtype="float32",
        finish=None,
        gate=gate,
    )


@pytest.mark.parametrize("name", RINGS)
def test_a_collective_waits_for_its_gate_and_those_behind_it_too(name: str) -> None:
    """Its source is read after the gate has opened; what was called before it goes on meanwhile."""
    with MemoryRing(2, CONFIG, transports=RINGS[name](2, CONFIG)) as ring:
        gates = [Gate(2), Gate(2)]
        tensors = [torch.zeros(3000) for _ in range(2)]
        before = [one.all_reduce(torch.ones(3000), async_op=True) for one in ring.communicators]
        held = [
            backend.start(gated(tensor, gate))
            for backend, tensor, gate in zip(ring._backends, tensors, gates, strict=True)
        ]
        behind = [one.all_reduce(torch.ones(3), async_op=True) for one in ring.communicators]
        for handle in before:
            handle.wait(20)
        assert not any(handle.done() for handle in (*held, *behind))
        for rank, (tensor, gate) in enumerate(zip(tensors, gates, strict=True)):
            tensor.fill_(rank + 1)
            gate.step()
            assert not gate.is_open
            gate.step()
        for handle in (*held, *behind):
            handle.wait(20)
        assert all(torch.equal(tensor, torch.full((3000,), 3.0)) for tensor in tensors)


@pytest.mark.parametrize("name", RINGS)
def test_nobody_turns_round_while_a_gate_is_closed(name: str) -> None:
    """Also when the peer has sent its chunks already."""
    with MemoryRing(2, CONFIG, transports=RINGS[name](2, CONFIG)) as ring:
        gate = Gate()
        tensors = [torch.ones(20_000) for _ in range(2)]
        handles = [
            backend.start(gated(tensor, one))
            for backend, tensor, one in zip(ring._backends, tensors, (gate, Gate(0)), strict=True)
        ]
        engine = ring._backends[0]._engine
        assert engine is not None
        turns = 0
        turn = engine._turn

        def counting() -> None:
            nonlocal turns
            turns += 1
            turn()

        engine._turn = counting  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            handles[0].wait(0.3)
        assert turns < 30
        gate.step()
        for handle in handles:
            handle.wait(20)


def test_a_failure_ends_what_waits_for_its_gate() -> None:
    with MemoryRing(2, CONFIG) as ring:
        handle = ring._backends[0].start(gated(torch.ones(3), Gate()))
        ring.lose(1, "process exited by signal 9")
        with pytest.raises(PeerLostError):
            handle.wait(20)
