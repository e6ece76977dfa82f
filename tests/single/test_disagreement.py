"""Ranks that call different things, stop calling, or are gone: always an error that names who."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringps.collectives import Communicator
from ringps.config import Config, Exchange, Timeouts
from ringps.errors import (
    ClosedError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLeftError,
    PeerLostError,
    RingpsError,
)
from ringps.testing import MemoryRing
from ringps.transport.loopback import LoopbackTransport, loopback_ring
from ringps.wire.header import decode, encode
from tests.rings import RINGS

CONFIG = Config(timeouts=Timeouts(op_timeout_s=20.0))


def run_each(ring: MemoryRing, work: Callable[[Communicator], Any]) -> list[BaseException | None]:
    """What `work` raised on each rank; nobody is told of another's failure."""
    raised: list[BaseException | None] = [None] * len(ring.communicators)

    def run(rank: int) -> None:
        try:
            work(ring.communicators[rank])
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(raised))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


odd = torch.ones(6)
DISAGREEMENTS: dict[str, tuple[Callable[[Communicator], Any], str, str]] = {
    "op": (
        lambda ring: ring.all_reduce(odd.clone(), "max"),
        "all_reduce(max, float32[6])",
        "all_reduce(sum, float32[6])",
    ),
    "dtype": (lambda ring: ring.all_reduce(odd.double()), "float64[6]", "float32[6]"),
    "shape": (lambda ring: ring.all_reduce(odd.clone().view(2, 3)), "float32[2, 3]", "float32[6]"),
    "fewer elements": (lambda ring: ring.all_reduce(odd[:5].clone()), "float32[5]", "float32[6]"),
    "kind": (lambda ring: ring.broadcast(odd.clone()), "broadcast(float32[6], src=0)", "all_reduce"),
    "barrier": (lambda ring: ring.barrier(), "barrier(uint8[0])", "all_reduce"),
}


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("case", DISAGREEMENTS)
@pytest.mark.parametrize("transport", ["loopback", "tcp"])
def test_every_rank_learns_who_called_what(case: str, world_size: int, transport: str) -> None:
    call, theirs, ours = DISAGREEMENTS[case]

    def work(ring: Communicator) -> None:
        ring.barrier()
        call(ring) if ring.rank == 1 else ring.all_reduce(odd.clone())
        ring.barrier()

    with MemoryRing(world_size, CONFIG, transports=RINGS[transport](world_size, CONFIG)) as ring:
        raised = run_each(ring, work)
    for error in raised:
        assert isinstance(error, CollectiveMismatchError)
        lines = str(error).splitlines()
        assert theirs in next(line for line in lines if "rank 1 (worker 1" in line)
        # A rank that had not come that far yet is listed with where it was.
        assert any(ours in line and "rank 1" not in line for line in lines)


def test_another_order_is_a_disagreement() -> None:
    def work(ring: Communicator) -> None:
        tensors = [torch.ones(4), torch.ones(5)]
        if ring.rank == 2:
            tensors.reverse()
        handles = [ring.all_reduce(tensor, async_op=True) for tensor in tensors]
        for handle in handles:
            handle.wait()

    with MemoryRing(3, CONFIG) as ring:
        assert all(isinstance(error, CollectiveMismatchError) for error in run_each(ring, work))


def test_other_chunk_sizes_are_a_disagreement() -> None:
    links = loopback_ring(2)
    configs = [Config(exchange=Exchange(chunk_bytes=size)) for size in (64, 128)]
    with (
        MemoryRing(2, configs[0], transports=links) as ring,
        MemoryRing(2, configs[1], transports=loopback_ring(2)) as other,
    ):
        ring._backends[1]._exchange = other._backends[1]._exchange
        raised = run_each(ring, lambda comm: comm.all_reduce(torch.ones(100)))
    assert all(isinstance(error, CollectiveMismatchError) for error in raised)


def test_a_rank_that_never_calls_makes_a_timeout_that_names_it() -> None:
    config = Config(timeouts=Timeouts(op_timeout_s=0.3))

    def work(ring: Communicator) -> None:
        ring.barrier()
        if ring.rank != 1:
            ring.all_reduce(odd.clone())

    with MemoryRing(3, config) as ring:
        raised = run_each(ring, work)
    assert raised[1] is None
    late = [error for error in raised if error is not None]
    assert all(isinstance(error, CollectiveTimeoutError) for error in late)
    assert "rank 1 (worker 1 on memory): no call yet, after number 1, barrier" in str(late[0])


def test_a_slow_rank_is_waited_for_as_long_as_something_moves() -> None:
    config = Config(timeouts=Timeouts(op_timeout_s=5.0), exchange=Exchange(chunk_bytes=64))
    go = threading.Event()

    def work(ring: Communicator) -> None:
        if ring.rank == 0:
            assert go.wait(30)
        handle = ring.all_reduce(torch.ones(1000), async_op=True)
        if ring.rank == 1:
            go.set()
        handle.wait()

    with MemoryRing(3, config) as ring:
        assert run_each(ring, work) == [None] * 3


def test_a_timeout_that_progress_overtakes_is_none() -> None:
    """The collective moves again while the ranks are being asked why it did not."""
    config = Config(timeouts=Timeouts(op_timeout_s=0.2, inquiry_timeout_s=30.0))
    asked = threading.Event()
    with MemoryRing(2, config) as ring:
        ring._backends[0]._docket._referee = Silent(asked)
        tensors = [torch.full((6,), float(rank + 1)) for rank in range(2)]
        first = ring.communicators[0].all_reduce(tensors[0], async_op=True)
        assert asked.wait(20)
        ring.communicators[1].all_reduce(tensors[1])
        first.wait(20)
        ring._backends[0].verdict(1, ("same | done", "same | done"))
        both = [comm.all_reduce(odd.clone(), async_op=True) for comm in ring.communicators]
        for handle in both:
            handle.wait(20)


class Silent:
    """A referee that takes its time."""

    def __init__(self, asked: threading.Event) -> None:
        self._asked = asked

    def dispute(self, sequence: int) -> None:
        self._asked.set()


def test_without_an_answer_the_neighbours_are_named() -> None:
    config = Config(timeouts=Timeouts(inquiry_timeout_s=0.1))
    with MemoryRing(2, config) as ring:
        for backend in ring._backends:
            backend._docket._referee = Silent(threading.Event())
        calls = [torch.ones(3), torch.ones(4)]
        raised = run_each(ring, lambda comm: comm.all_reduce(calls[comm.rank]))
    for rank, error in enumerate(raised):
        assert isinstance(error, CollectiveMismatchError)
        assert f"rank {1 - rank} (worker {1 - rank} on memory) something else" in str(error)


def test_a_lost_rank_ends_what_is_under_way_and_all_that_follows() -> None:
    with MemoryRing(3, CONFIG) as ring:
        waiting = [ring.communicators[rank].all_reduce(odd.clone(), async_op=True) for rank in (0, 2)]
        ring.lose(1, "process exited by signal 9 (SIGKILL)")
        for handle in waiting:
            with pytest.raises(
                PeerLostError, match=r"rank 1 \(worker 1 on memory\) lost: .* signal 9"
            ) as caught:
                handle.wait(20)
            assert (caught.value.rank, caught.value.blames) == (1, 1)
        with pytest.raises(PeerLostError):
            ring.communicators[0].barrier()


def test_a_rank_that_left_is_an_error_only_for_those_who_need_it() -> None:
    with MemoryRing(2, CONFIG) as ring:
        assert run_each(ring, lambda comm: comm.all_reduce(odd.clone())) == [None, None]
        ring.leave(1)
        ring._backends[0].drain()
        with pytest.raises(PeerLeftError, match=r"rank 1 .* shut down after 1 collectives, .* all_reduce"):
            ring.communicators[0].all_reduce(odd.clone())


def test_closing_ends_what_is_under_way() -> None:
    with MemoryRing(2, CONFIG) as ring:
        handle = ring.communicators[0].all_reduce(odd.clone(), async_op=True)
    with pytest.raises(ClosedError):
        handle.wait(20)
    with pytest.raises(ClosedError):
        ring.communicators[1].barrier()


def test_a_wait_may_give_up_and_come_back() -> None:
    with MemoryRing(2, CONFIG) as ring:
        first = ring.communicators[0].all_reduce(odd.clone(), async_op=True)
        with pytest.raises(TimeoutError):
            first.wait(0.01)
        second = ring.communicators[1].all_reduce(odd.clone(), async_op=True)
        first.wait(20)
        second.wait(20)


def test_a_false_alarm_is_refused_and_changes_nothing() -> None:
    """A chunk with a wrong signature that no rank stands by."""
    links = loopback_ring(2)
    forge_first(links[1])
    with MemoryRing(2, CONFIG, transports=links) as ring:
        tensors = [torch.full((6,), float(rank + 1)) for rank in range(2)]
        handle = ring.communicators[1].all_reduce(tensors[1], async_op=True)
        ring.communicators[0].all_reduce(tensors[0])
        handle.wait(20)
        assert ring.communicators[0].statistics().refused == {"signature": 1}
    assert torch.equal(tensors[0], torch.full((6,), 3.0))
    assert torch.equal(tensors[0], tensors[1])


def forge_first(link: LoopbackTransport) -> None:
    """Before its first frame, send the same one with another signature."""
    send = link.send

    def forge(peer: int, header: bytes, payload: memoryview) -> object:
        link.send = send  # type: ignore[method-assign]
        fields = decode(header)
        send(peer, encode(fields._replace(signature=fields.signature ^ 1)), payload)
        return send(peer, header, payload)

    link.send = forge  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_frame_twice_and_out_of_turn_changes_nothing(world_size: int) -> None:
    """Each link repeats every frame, and between frames sends one of a collective to come."""
    config = Config(exchange=Exchange(chunk_bytes=64, send_queue_chunks=100_000, doubling_bytes=0))
    links = loopback_ring(world_size, capacity_frames=100_000)
    for link in links:
        repeat_everything(link)
    with MemoryRing(world_size, config, transports=links) as ring:
        tensors = [torch.full((500,), rank + 1.0) for rank in range(world_size)]
        for _ in range(5):
            assert run_each(ring, lambda comm: comm.all_reduce(tensors[comm.rank])) == [None] * world_size
        for tensor in tensors[1:]:
            assert torch.equal(tensor, tensors[0])
        counted = ring.communicators[0].statistics().refused
    assert counted.keys() <= {"duplicate chunk", "ahead of its turn", "collective that has ended"}
    assert counted["duplicate chunk"] > 100
    assert counted["ahead of its turn"] > 100
    total = sum(range(1, world_size + 1))
    assert torch.equal(tensors[0], torch.full((500,), float(total * world_size**4)))


def repeat_everything(link: LoopbackTransport) -> None:
    send = link.send

    def repeat(peer: int, header: bytes, payload: memoryview) -> object:
        fields = decode(header)
        send(peer, header, payload)
        send(peer, encode(fields._replace(sequence=fields.sequence + 7)), payload)
        return send(peer, header, payload)

    link.send = repeat  # type: ignore[method-assign, assignment]


def test_a_defect_inside_reaches_the_caller() -> None:
    class Broken(Exception):
        pass

    links = loopback_ring(2)

    def explode(peer: int, admit: object) -> None:
        raise Broken

    links[0].receive = explode  # type: ignore[method-assign, assignment]
    with MemoryRing(2, CONFIG, transports=links) as ring:
        handle = ring.communicators[0].all_reduce(odd.clone(), async_op=True)
        with pytest.raises(RingpsError, match="Broken") as caught:
            handle.wait(20)
        assert isinstance(caught.value.__cause__, Broken)
