"""Which transport a ring uses, which members share a host, and which exchange between hosts."""

from __future__ import annotations

import pytest

from ringps.collectives.choice import choose
from ringps.config import TransportName
from ringps.errors import SetupError
from ringps.ring.lanes import hosts, lanes
from ringps.ring.topology import Generation, Member


def by_host(names: str) -> tuple[tuple[int, ...], ...]:
    members = tuple(Member(worker_id=at, host=host, address="") for at, host in enumerate(names))
    return hosts(Generation(number=1, members=members, rank=0))


@pytest.mark.parametrize(
    ("asked", "names", "way"),
    [
        ("auto", "a", "alone"),
        ("shm", "a", "alone"),
        ("auto", "aa", "shm"),
        ("shm", "aaa", "shm"),
        ("tcp", "aaa", "tcp"),
        ("zmq", "ab", "zmq"),
        ("auto", "ab", "tcp"),
        ("auto", "aab", "hierarchical"),
        ("auto", "abb", "hierarchical"),
        ("tcp", "aabb", "tcp"),
    ],
)
def test_what_is_chosen(asked: TransportName, names: str, way: str) -> None:
    choice = choose([asked] * len(names), by_host(names))
    assert choice.way == way
    assert choice.reason


def test_what_cannot_be_had_is_an_error() -> None:
    with pytest.raises(SetupError, match="all workers on one host, and they are on 2"):
        choose(["shm"] * 3, by_host("aab"))


def test_members_must_want_the_same() -> None:
    with pytest.raises(
        SetupError, match="rank 0 was started with --transport auto, rank 2 with --transport tcp"
    ):
        choose(["auto", "auto", "tcp"], by_host("aab"))


@pytest.mark.parametrize(
    ("names", "rings"),
    [
        ("aabb", ((0, 2), (1, 3))),
        ("aaab", ((0, 3),)),
        ("abab", ((0, 1), (2, 3))),
        ("aabbbcc", ((0, 2, 5), (1, 3, 6))),
        ("abc", ((0, 1, 2),)),
    ],
)
def test_lanes_join_the_same_position_of_every_host(names: str, rings: tuple[tuple[int, ...], ...]) -> None:
    assert lanes(by_host(names)) == rings


@pytest.mark.parametrize("names", ["aabb", "aabbcc", "aaabbbccc", "ab"])
def test_a_ring_in_the_order_of_hosts_crosses_each_boundary_once(names: str) -> None:
    order = [rank for ranks in by_host(names) for rank in ranks]
    crossings = [(names[a], names[b]) for a, b in zip(order, order[1:] + order[:1], strict=True)]
    between = [pair for pair in crossings if pair[0] != pair[1]]
    assert len(between) == len(set(between)) == len(set(names))
