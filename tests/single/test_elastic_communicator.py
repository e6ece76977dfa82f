"""`ElasticCommunicator`s whose ranks are threads: losses, flipped bits, members that come and go."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringps.collectives import Change, ElasticCommunicator
from ringps.collectives.backend import Work
from ringps.config import Config, Recovery
from ringps.errors import (
    CollectiveError,
    CollectiveMismatchError,
    DivergedError,
    PeerLostError,
    RingChangedError,
)
from ringps.ring.commit import NOTHING, Ballot
from tests.elastic_rings import Connected, ElasticRing, Killed, bytes_of, listening


class Moments:
    """Counts the moments of each worker's life, and kills it at one of them."""

    def __init__(self, deaths: dict[int, int] | None = None) -> None:
        """
        Args:
            deaths: by worker, the moment (from 1) that it does not survive.
        """
        self._deaths = deaths or {}
        self.passed: Counter[int] = Counter()

    def __call__(self, worker_id: int, when: str, work: Work) -> None:
        self.passed[worker_id] += 1
        if self._deaths.get(worker_id) == self.passed[worker_id]:
            raise Killed


def collectives(worker_id: int, ring: ElasticCommunicator) -> list[bytes]:
    """Every kind that goes on when members are lost; what came out."""
    total = torch.full((5,), 1 << worker_id, dtype=torch.int64)
    ring.all_reduce(total)
    word = torch.arange(3) + 10 * worker_id
    ring.broadcast(word)
    ring.barrier()
    mean = torch.full((7, 2), float(worker_id)).t()
    ring.all_reduce(mean, "max")
    return [bytes_of(total), bytes_of(word), bytes_of(mean)]


def check_survivors(results: dict[int, list[bytes]], size: int, lost: set[int]) -> None:
    """All hold the same, which some set of workers with all survivors among them has given."""
    assert set(results) == set(range(size)) - lost
    first, *others = results.values()
    assert all(other == first for other in others)
    contributed = int.from_bytes(first[0][:8], "little")
    assert contributed & sum(1 << one for one in results) == sum(1 << one for one in results)
    assert contributed < 1 << size


def moments_of(size: int) -> int:
    counter = Moments()
    ElasticRing(size, tamper=counter).run(collectives)
    return counter.passed[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_go_on_wherever_a_member_is_lost(size: int) -> None:
    for victim in range(size):
        for moment in range(1, moments_of(size) + 1):
            ring = ElasticRing(size, tamper=Moments({victim: moment}))
            results = ring.run(collectives)
            check_survivors(results, size, {victim})
            for worker_id in results:
                statistics = ring.communicators[worker_id].elastic_statistics()
                assert statistics.operations == 4
                assert statistics.generations <= 1
                assert statistics.repeated + statistics.rolled_forward <= 1
                assert (statistics.recovering_s > 0) == (statistics.generations == 1)


def test_collectives_go_on_wherever_a_second_member_is_lost_too() -> None:
    size, moments = 3, moments_of(3)
    for first in range(2, moments, 3):
        for second in range(first, moments + 3):
            ring = ElasticRing(size, tamper=Moments({0: first, 2: second}))
            results = ring.run(collectives)
            assert set(results) <= {1, 2}
            check_survivors(results, size, set(range(size)) - set(results))


@pytest.mark.parametrize("point", ["vote", "voted", "handshake"])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_last_word_counts(point: str, victim: int) -> None:
    """`vote`: it has not voted. `voted`: it may have committed, so what it has given counts. `handshake`:
    another member is lost before. But for `voted`, it depends on whether all who are left have a result."""
    other = (victim + 1) % 3

    def listen(worker_id: int, at: str, passed: dict[str, Any]) -> None:
        if worker_id == victim and at == point:
            raise Killed
        if point == "handshake" and worker_id == other and at == "vote":
            raise Killed

    def script(worker_id: int, ring: ElasticCommunicator) -> int:
        total = torch.tensor(1 << worker_id)
        ring.all_reduce(total)
        return int(total)

    ring = ElasticRing(3)
    with listening(listen):
        results = ring.run(script)
    lost = {victim, other} if point == "handshake" else {victim}
    assert results.keys() == {0, 1, 2} - lost
    [total] = set(results.values())
    least = sum(1 << one for one in results)
    assert total & least == least
    assert total == 7 or point != "voted"
    for worker_id in results:
        statistics = ring.communicators[worker_id].elastic_statistics()
        # Who has got all votes before the loss is known has committed, and never hears of it.
        assert statistics.generations in {"vote": {1}, "voted": {0, 1}, "handshake": {2}}[point]
        assert statistics.repeated + statistics.rolled_forward <= 1


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_broadcast_goes_on_from_the_same_worker(victim: int) -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[int, str]:
        tensor = torch.tensor(worker_id)
        try:
            ring.broadcast(tensor, src=3)
            return int(tensor), ""
        except PeerLostError as error:
            ring.broadcast(tensor, src=2)
            return int(tensor), str(error)

    results = ElasticRing(4, tamper=Moments({victim: 1})).run(script)
    assert results.keys() == {0, 1, 2, 3} - {victim}
    if victim == 3:
        [(found, text)] = set(results.values())
        assert found == 2
        assert (
            "rank 3 (worker 3 on here) lost: amid a broadcast that started from it; there are 3 ranks now"
            in text
        )
        assert "call it again with src as one of them" in text
    else:
        assert set(results.values()) == {(3, "")}


def test_what_a_rank_has_committed_another_rolls_forward() -> None:
    """Worker 0 dies when it has committed; worker 1 never hears of its vote's success."""

    def tamper(worker_id: int, when: str, work: Work) -> None:
        if work.kind == "all_gather" and when == "after" and worker_id == 1 and not heard:
            heard.append(worker_id)
            assert died.wait(20)
            raise PeerLostError(rank=0, worker_id=0, host="here", reason="a test")

    def script(worker_id: int, ring: ElasticCommunicator) -> int:
        total = torch.tensor(1 << worker_id)
        ring.all_reduce(total)
        if worker_id == 0:
            died.set()
            raise Killed
        return int(total)

    heard: list[int] = []
    died = threading.Event()
    ring = ElasticRing(2, tamper=tamper)
    assert ring.run(script) == {1: 3}
    assert ring.communicators[1].elastic_statistics().rolled_forward == 1
    assert ring.communicators[1].committed == 1
    assert [note["decision"] for note in ring.notes] == ["forward"]


@pytest.mark.parametrize(
    ("transport", "hosts"),
    [
        ("shm", ("a", "a", "a")),
        ("tcp", ("a", "a", "a")),
        ("zmq", ("a", "a", "a")),
        ("auto", ("a", "a", "b", "b")),
    ],
)
def test_a_member_is_lost_over_every_transport(transport: Any, hosts: tuple[str, ...]) -> None:
    for victim, moment in ((0, 1), (len(hosts) - 1, 3), (1, 8)):
        network = Connected(Config(transport=transport), hosts)
        try:
            ring = ElasticRing(len(hosts), network=network, tamper=Moments({victim: moment}))
            check_survivors(ring.run(collectives), len(hosts), {victim})
        finally:
            network.close()


def test_a_ring_shrinks_to_one_and_a_member_does_the_rest_alone() -> None:
    ring = ElasticRing(4, tamper=Moments({0: 1, 2: 4, 3: 7}))
    results = ring.run(collectives)
    check_survivors(results, 4, {0, 2, 3})
    assert ring.communicators[1].world_size == 1


# What cannot go on.


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_sizes_that_fit_no_more_are_an_error_that_says_what_to_do(kind: str) -> None:
    def call(ring: ElasticCommunicator) -> torch.Tensor:
        if kind == "all_gather":
            output = torch.empty(ring.world_size, dtype=torch.int64)
            ring.all_gather(output, torch.tensor([ring.generation.members[ring.rank].worker_id]))
        else:
            output = torch.empty(1)
            ring.reduce_scatter(output, torch.ones(ring.world_size))
        return output

    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[str, int, list[float]]:
        with pytest.raises(PeerLostError) as caught:
            call(ring)
        return str(caught.value), caught.value.blames, call(ring).tolist()

    results = ElasticRing(3, tamper=Moments({1: 1})).run(script)
    assert set(results) == {0, 2}
    for text, lost, again in results.values():
        assert (
            f"rank 1 (worker 1 on here) lost: amid {kind}, whose sizes were for 3 ranks; there are 2 now"
            in text
        )
        assert "call it again with tensors for that many" in text
        assert lost == 1
        assert again == ([0, 2] if kind == "all_gather" else [2.0])


def test_all_gather_is_done_again_by_itself_if_as_many_ranks_are_left() -> None:
    """A generation may end although nobody is lost."""

    def tamper(worker_id: int, when: str, work: Work) -> None:
        if worker_id == 1 and work.kind == "all_gather" and not interrupted:
            interrupted.append(when)
            raise RingChangedError("a link is broken")

    def script(worker_id: int, ring: ElasticCommunicator) -> list[int]:
        output = torch.empty(3, dtype=torch.int64)
        ring.all_gather(output, torch.tensor([worker_id]))
        return output.tolist()

    interrupted: list[str] = []
    ring = ElasticRing(3, tamper=tamper)
    assert ring.run(script) == {one: [0, 1, 2] for one in range(3)}
    assert {one.elastic_statistics().generations for one in ring.communicators} == {1}


def test_ranks_that_call_different_things_are_told() -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> str:
        if worker_id == 1:
            ring.record_step(3)
        with pytest.raises(CollectiveMismatchError) as caught:
            ring.barrier()
        return str(caught.value)

    for text in ElasticRing(2).run(script).values():
        assert "rank 0: operation 1 of step 0 in generation 1" in text
        assert "rank 1: operation 1 of step 3" in text
        assert "every rank must call the same collectives in the same order" in text


# Flipped bits.


def flip(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def flips(
    sick: int, times: int, kind: str = "all_reduce", when: str = "after"
) -> Callable[[int, str, Work], None]:
    """In the results that worker `sick` gets, the first `times`."""
    done: list[str] = []

    def tamper(worker_id: int, at: str, work: Work) -> None:
        if worker_id == sick and at == when and work.kind == kind and len(done) < times:
            done.append(work.label)
            flip(work.output)

    return tamper


def reduce_ones(worker_id: int, ring: ElasticCommunicator) -> list[float]:
    tensor = torch.ones(6)
    ring.all_reduce(tensor)
    return tensor.tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("times", [1, 3])
def test_a_flipped_bit_is_noticed_and_the_result_made_anew(size: int, times: int) -> None:
    ring = ElasticRing(size, tamper=flips(size - 1, times))
    assert ring.run(reduce_ones) == dict.fromkeys(range(size), [float(size)] * 6)
    assert ring.notes == [
        {"event": "diverged", "step": 0, "what": "reduced bits", "worker_ids": [size - 1]},
    ]
    assert {one.elastic_statistics().diverged for one in ring.communicators} == {times}
    assert {one.committed for one in ring.communicators} == {1}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_flipped_bit_ends_the_job_where_that_is_wanted(size: int) -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[str, tuple[int, ...]]:
        with pytest.raises(DivergedError) as caught:
            reduce_ones(worker_id, ring)
        return str(caught.value), caught.value.worker_ids

    ring = ElasticRing(size, Recovery(on_divergence="stop"), tamper=flips(0, 1))
    for text, wrong in ring.run(script).values():
        assert "step 0: reduced bits of rank 0 (worker 0 on here) were wrong (on_divergence=stop)" in text
        assert wrong == (0,)


@pytest.mark.parametrize("size", [2, 3])
def test_bits_that_stay_wrong_end_the_job(size: int) -> None:
    def script(worker_id: int, ring: ElasticCommunicator) -> tuple[str, tuple[int, ...]]:
        with pytest.raises(DivergedError, match=r"also after 3 attempts") as caught:
            reduce_ones(worker_id, ring)
        return str(caught.value), caught.value.worker_ids

    for text, wrong in ElasticRing(size, tamper=flips(1, 100)).run(script).values():
        assert ("(rank 1 (worker 1 on here))" if size == 3 else "(no majority)") in text
        assert wrong == ((1,) if size == 3 else ())


# Members that come and go.


def boundary(ring: ElasticCommunicator) -> Change | None:
    """A step's commit; what all agreed on."""
    ring.transact(lambda before: NOTHING, lambda: Ballot(step=1, boundary=True))
    return ring.take_change()


def test_all_learn_at_once_who_leaves_and_who_is_known_to_wait() -> None:
    ring = ElasticRing(3)
    ring.leaving, ring.joiners = {1}, (7, 9)

    def script(worker_id: int, communicator: ElasticCommunicator) -> tuple[Change | None, Change | None]:
        communicator.marks = lambda: worker_id + 3
        communicator.barrier()
        assert communicator.take_change() is None  # not between two steps
        return boundary(communicator), communicator.take_change()

    assert ring.run(script) == dict.fromkeys(range(3), (Change(1, (7, 9), (1,), (3, 4, 5)), None))


def test_a_member_leaves_and_the_others_go_on_together() -> None:
    ring = ElasticRing(3)
    ring.leaving = {0}

    def script(worker_id: int, communicator: ElasticCommunicator) -> tuple[bool, list[float]]:
        change = boundary(communicator)
        assert change is not None
        with contextlib.suppress(PeerLostError, RingChangedError):
            communicator.raw.barrier()  # all have come to know of it
        if communicator.rank in change.leavers:
            raise Killed
        communicator.reform(RingChangedError("members leave"))
        together = communicator.settle()
        return together, reduce_ones(worker_id, communicator)

    assert ring.run(script) == dict.fromkeys((1, 2), (True, [2.0] * 6))


def test_a_worker_joins_between_two_operations() -> None:
    ring = ElasticRing(2, newcomers=1)

    def script(worker_id: int, communicator: ElasticCommunicator) -> tuple[int, list[float]]:
        if communicator.joining:
            communicator.barrier()  # at once
            with pytest.raises(CollectiveError, match=r"call those only `if not ringps.joining\(\)`"):
                communicator.all_reduce(torch.ones(1))
            communicator.enter(*ring.enter(worker_id))
            assert not communicator.joining
        else:
            for _ in range(4):
                communicator.barrier()
            with contextlib.suppress(RingChangedError):
                communicator.raw.barrier()  # all are between the same two operations
            ring.admit(2)
            communicator.reform(RingChangedError("workers join"))
            assert communicator.settle()
        found = reduce_ones(worker_id, communicator)
        return communicator.committed, found

    assert ring.run(script) == dict.fromkeys(range(3), (5, [3.0] * 6))


def test_who_joins_is_left_with_one_who_has_not_heard_of_the_last_commit() -> None:
    """Worker 1 has committed; worker 0 holds the result, and commits it when it meets worker 2."""

    def tamper(worker_id: int, when: str, work: Work) -> None:
        if worker_id == 0 and when == "after" and work.kind == "all_gather" and not heard:
            heard.append(when)
            assert committed.wait(20)
            ring.admit(2)
            raise RingChangedError("another generation is to form")

    def script(worker_id: int, communicator: ElasticCommunicator) -> int:
        if worker_id == 2:
            communicator.enter(*ring.enter(worker_id))
        else:
            communicator.barrier()
            committed.set()
        communicator.barrier()
        return communicator.committed

    heard: list[str] = []
    committed = threading.Event()
    ring = ElasticRing(2, newcomers=1, tamper=tamper)
    assert ring.run(script) == dict.fromkeys(range(3), 2)
