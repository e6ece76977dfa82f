"""Collectives through shared memory, and of several hosts: the same bits as over any other transport."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringps.collectives import Communicator
from ringps.collectives.formation import Doors
from ringps.collectives.serial import SerialBackend
from ringps.collectives.shm import group as group_module
from ringps.collectives.shm import links
from ringps.collectives.shm.executor import SharedMemory
from ringps.collectives.shm.memory import Segment
from ringps.config import Config, Exchange, Timeouts, TransportName
from ringps.errors import (
    ClosedError,
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLeftError,
    PeerLostError,
    RingpsError,
    SetupError,
)
from ringps.ring.topology import Generation, Member
from ringps.testing import run_ring
from ringps.transport.keys import JobKey
from tests.formed import FormedRing, on_threads, worker
from tests.support import require

SHM = Config(transport="shm")
FEW = Exchange(doubling_bytes=256)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens many times even for small tensors."""
    monkeypatch.setattr(group_module, "MOST_PIECE_BYTES", 1024)
    monkeypatch.setattr(group_module, "_BLOCK_BYTES", 512)


def inputs(world_size: int, numel: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(numel, generator=generator) * 9).to(dtype) for _ in range(world_size)]


def reduced(tensors: list[torch.Tensor], op: str) -> Callable[[Communicator], torch.Tensor]:
    def script(ring: Communicator) -> torch.Tensor:
        mine = tensors[ring.rank].clone()
        ring.all_reduce(mine, op)
        return mine

    return script


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("world_size", [2, 3, 5, 9])
def test_all_reduce_gives_the_bits_of_the_ring(world_size: int) -> None:
    config = Config(transport="shm", exchange=FEW)
    with FormedRing(["here"] * world_size, config) as ring:

        @given(
            st.sampled_from([0, 1, world_size, 63, 64, 257, 1000, 4099]),
            st.sampled_from(DTYPES),
            st.sampled_from(["sum", "mean", "min", "max", "prod"]),
            st.booleans(),
            st.integers(0, 99),
        )
        def check(numel: int, dtype: torch.dtype, op: str, shared: bool, seed: int) -> None:
            if op == "mean" and not dtype.is_floating_point:
                op = "sum"
            tensors = inputs(world_size, numel, dtype, seed)
            wanted = run_ring(world_size, reduced(tensors, op), config)

            def script(comm: Communicator) -> torch.Tensor:
                here = shared and seed >> comm.rank % 4 & 1 == 0
                mine = comm.empty(numel, dtype) if here else torch.empty(numel, dtype=dtype)
                mine.copy_(tensors[comm.rank])
                comm.all_reduce(mine, op)
                return mine.clone()

            for got, want in zip(ring.run(script), wanted, strict=True):
                assert torch.equal(got, want), (numel, dtype, op)

        check()


@pytest.mark.parametrize("numel", [300_000, 2_000_003])
def test_all_reduce_of_real_sizes(numel: int) -> None:
    tensors = inputs(3, numel, torch.float32)
    wanted = run_ring(3, reduced(tensors, "mean"))
    with FormedRing(["here"] * 3, SHM) as ring:
        for got in ring.run(reduced(tensors, "mean")):
            assert torch.equal(got, wanted[0])


HOSTS = {
    "one host": ["a"] * 4,
    "two by two": ["a", "a", "b", "b"],
    "uneven": ["a", "a", "a", "b"],
    "three hosts": ["a", "b", "b", "c", "c", "c"],
    "not side by side": ["a", "b", "a", "b", "b"],
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS.keys())
def test_every_collective_on_every_arrangement_of_hosts(hosts: list[str]) -> None:
    """Whole numbers, so that sums are exact in any order."""
    n = len(hosts)

    def script(comm: Communicator) -> None:
        for numel in (0, 1, 5, 100, 999, 5000):
            own = torch.arange(numel) * 3 + comm.rank
            everyone = torch.stack([torch.arange(numel) * 3 + rank for rank in range(n)])

            total = own.clone()
            comm.all_reduce(total)
            assert torch.equal(total, everyone.sum(0)), ("all_reduce", numel)

            output = torch.zeros_like(own)
            kept = own.clone()
            comm.all_reduce_into(output, own, "max", label="into").wait()
            assert torch.equal(output, everyone.max(0).values)
            assert torch.equal(own, kept)

            gathered = torch.empty(n, numel, dtype=own.dtype)
            comm.all_gather(gathered, own)
            assert torch.equal(gathered, everyone), ("all_gather", numel)

            part = torch.empty(numel, dtype=own.dtype)
            comm.reduce_scatter(part, gathered.flatten() + comm.rank)
            assert torch.equal(part, everyone[comm.rank] * n + sum(range(n))), ("reduce_scatter", numel)

            for src in range(n):
                copied = own.clone()
                comm.broadcast(copied, src)
                assert torch.equal(copied, everyone[src]), ("broadcast", numel, src)
            comm.barrier()
        strided = torch.zeros(40, 50).t()
        strided += comm.rank
        comm.all_reduce(strided, "mean")
        assert torch.equal(strided, torch.full((50, 40), sum(range(n)) / n))
        assert comm.gather_bytes(b"x" * comm.rank) == [b"x" * rank for rank in range(n)]

    with FormedRing(hosts) as ring:
        ring.run(script)


def test_rounding_is_the_same_on_all_ranks_of_all_hosts() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(5, 50_001, dtype)
        with FormedRing(["a", "a", "b", "b", "b"]) as ring:
            first, *others = ring.run(reduced(tensors, "mean"))
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(first.float(), torch.stack(tensors).float().mean(0), rtol=1e-2, atol=1e-2)


def test_encrypted_between_hosts() -> None:
    tensors = inputs(4, 10_000, torch.float32)
    with FormedRing(["a", "a", "b", "b"], encrypt=True) as ring:
        first, *others = ring.run(reduced(tensors, "sum"))
    assert all(torch.equal(first, other) for other in others)


def test_auto_says_what_it_chose() -> None:
    with FormedRing(["a", "a"]) as ring:
        assert ring.summary == "2 workers on 1 host, transport shm (auto: all workers are on one host)"
    with FormedRing(["a", "a", "b"]) as ring:
        assert "transport hierarchical (auto: shared memory inside the hosts, TCP between" in ring.summary
    with FormedRing(["a", "b"]) as ring:
        assert "transport tcp (auto: every worker is on a host of its own)" in ring.summary


def test_shm_on_several_hosts_is_refused() -> None:
    with pytest.raises(SetupError, match="needs all workers on one host, and they are on 2"):
        FormedRing(["a", "b"], SHM)


def test_asynchronous_and_waiting_calls_keep_their_order() -> None:
    def script(comm: Communicator) -> list[float]:
        tensors = [torch.full((10_000,), float(at)) for at in range(8)]
        handles = [comm.all_reduce(one, async_op=True) for one in tensors]
        last = torch.ones(3)
        comm.all_reduce(last)
        assert all(handle.done() for handle in handles if handle is not None)
        for handle in handles:
            assert handle is not None
            handle.wait()
        return [one[-1].item() for one in tensors] + last.tolist()

    with FormedRing(["here"] * 3, SHM) as ring:
        assert ring.run(script) == [[3.0 * at for at in range(8)] + [3.0] * 3] * 3


# When something goes wrong.


def test_different_calls_name_what_each_rank_called() -> None:
    def script(comm: Communicator) -> None:
        comm.barrier()
        with pytest.raises(CollectiveMismatchError) as caught:
            comm.all_reduce(torch.zeros(10 + comm.rank % 2))
        assert "collective number 2" in str(caught.value)
        assert "float32[10]" in str(caught.value)
        assert "float32[11]" in str(caught.value)
        with pytest.raises(CollectiveMismatchError):
            comm.barrier()

    with FormedRing(["here"] * 3, SHM) as ring:
        ring.run(script)


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "a", "b", "b"]], ids=["one host", "two hosts"])
def test_a_rank_that_never_calls_is_named(hosts: list[str]) -> None:
    config = Config(timeouts=Timeouts(op_timeout_s=0.3, inquiry_timeout_s=0.2))
    with FormedRing(hosts, config) as ring:

        def script(comm: Communicator) -> RingpsError | None:
            if comm.rank == 0:
                return None
            with pytest.raises((CollectiveTimeoutError, PeerLostError)) as caught:
                comm.all_reduce(torch.zeros(10))
            return caught.value

        # A rank may first see another one give up and close its connections.
        errors = ring.run(script)[1:]
        named = [str(one) for one in errors if isinstance(one, CollectiveTimeoutError)]
    assert named
    assert all("rank 0 (worker 0 on a): no collective called yet" in one for one in named)


def test_hosts_that_call_different_things_are_told() -> None:
    config = Config(timeouts=Timeouts(op_timeout_s=5, inquiry_timeout_s=0.2))

    def script(comm: Communicator) -> None:
        with pytest.raises(CollectiveMismatchError) as caught:
            comm.all_reduce(torch.zeros(1000 + (comm.rank > 1)))
        assert "float32[1001]" in str(caught.value)

    with FormedRing(["a", "a", "b", "b"], config) as ring:
        ring.run(script)


def test_a_lost_peer_ends_waiting_and_queued_calls() -> None:
    with FormedRing(["here"] * 3, SHM) as ring:
        queued = threading.Barrier(3)

        def script(comm: Communicator) -> None:
            if comm.rank == 2:
                queued.wait()
                ring.lose(2)
                return
            handles = [comm.all_reduce(torch.zeros(9), async_op=True) for _ in range(3)]
            queued.wait()
            for handle in handles:
                assert handle is not None
                with pytest.raises(PeerLostError, match="rank 2"):
                    handle.wait()
            with pytest.raises(PeerLostError, match="rank 2"):
                comm.barrier()

        ring.run(script)


def test_a_closed_connection_is_a_lost_peer() -> None:
    """Nobody else says so."""
    with FormedRing(["here"] * 3, SHM) as ring:

        def script(comm: Communicator) -> None:
            if comm.rank == 1:
                ring.backends[1].close()
                return
            with pytest.raises(PeerLostError, match=r"rank 1 .*: its connection on this host closed"):
                comm.all_reduce(torch.zeros(1_000_000))

        ring.run(script)


def test_a_rank_that_left_is_named() -> None:
    with FormedRing(["here"] * 2, SHM) as ring:

        def script(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank == 1:
                ring.backends[0].peer_left(1, ring.backends[1].completed)
                return
            with pytest.raises(PeerLeftError, match="shut down after 1 collectives"):
                comm.barrier()

        ring.run(script)


def test_inputs_are_unharmed_whenever_a_peer_is_lost() -> None:
    """The loss comes while the reduction runs, at many different moments."""
    for moment in range(12):
        with FormedRing(["here"] * 3, SHM) as ring:
            posts = threading.Semaphore(0)

            def count(comm: Communicator, at: int = moment, posts: threading.Semaphore = posts) -> None:
                backend = ring.host_backend(comm.rank)
                assert isinstance(backend, SerialBackend)
                executor = backend._executor
                assert isinstance(executor, SharedMemory)
                signals, post, done = executor.signals, executor.signals.post, 0

                def posting() -> None:
                    nonlocal done
                    done += 1
                    if comm.rank == 2 and done > at:
                        posts.release()
                        raise PeerLostError(rank=2, worker_id=2, host="here", reason="for a test")
                    post()

                signals.post = posting  # type: ignore[method-assign]
                own = comm.empty(1_500_000, torch.float32).fill_(comm.rank)
                output = torch.empty(1_500_000)
                try:
                    comm.all_reduce_into(output, own).wait()
                except PeerLostError:
                    ring.lose(2)
                assert torch.equal(own, torch.full((1_500_000,), float(comm.rank)))

            ring.run(count)


def test_an_interrupted_collective_ends_the_ring_here() -> None:
    """Ctrl-C in the middle: the peers are a phase ahead, and nothing may be mixed up with what comes next."""
    with FormedRing(["here"] * 2, SHM) as ring:

        def interrupt(peer: object, since_s: float) -> float:
            raise KeyboardInterrupt

        ring.host_backend(0)._executor.signals.attend = interrupt  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            ring.communicators[0].all_reduce(torch.zeros(1_000_000))
        with pytest.raises(ClosedError, match="interrupted in this process"):
            ring.communicators[0].barrier()


# When it goes wrong while the ring forms.


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_member_lost_while_the_ring_forms_ends_the_waiting(transport: TransportName) -> None:
    """It listened, and is gone; the coordinator says so while the others wait for it."""
    config, token = Config(transport=transport), JobKey.generate()
    doors = [Doors(worker(rank, "here"), token, config, encrypt=False) for rank in range(3)]
    members = tuple(
        Member(worker_id=rank, host="here", address=door.address) for rank, door in enumerate(doors)
    )
    lost = PeerLostError(rank=1, worker_id=1, host="here", reason="for a test")
    looks = threading.Semaphore(0)

    def check() -> None:
        looks.release()
        if looks._value > 3:
            raise lost

    doors[1].close()

    def form(at: int) -> None:
        rank = (0, 2)[at]
        view = Generation(number=1, members=members, rank=rank)
        try:
            with pytest.raises(PeerLostError, match=r"rank 1 .* for a test"):
                doors[rank].form(view, None, check)  # type: ignore[arg-type]
        finally:
            doors[rank].close()

    begun_s = time.monotonic()
    on_threads(2, form)
    assert time.monotonic() - begun_s < config.timeouts.connect_timeout_s / 2


def test_settings_that_would_mix_up_small_and_large_are_refused() -> None:
    token = JobKey.generate()
    doors = [
        Doors(
            worker(rank, "here"),
            token,
            Config(transport="shm", exchange=Exchange(doubling_bytes=1024 * (rank + 1))),
            encrypt=False,
        )
        for rank in range(2)
    ]
    members = tuple(
        Member(worker_id=rank, host="here", address=door.address) for rank, door in enumerate(doors)
    )

    def form(rank: int) -> None:
        with pytest.raises(SetupError, match=r"different settings of ringps\.Exchange"):
            doors[rank].form(Generation(number=1, members=members, rank=rank), None)  # type: ignore[arg-type]

    on_threads(2, form)


def test_another_user_who_connects_and_says_nothing_holds_nobody_up() -> None:
    require(os.geteuid() == 0, "only root can become another user")
    token = JobKey.generate()
    doors = [Doors(worker(rank, "here"), token, SHM, encrypt=False) for rank in range(2)]
    members = tuple(
        Member(worker_id=rank, host="here", address=door.address) for rank, door in enumerate(doors)
    )
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
            for one in strangers:
                one.connect(links._name(token, 0))
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    begun_s = time.monotonic()
    formed = on_threads(
        2,
        lambda rank: doors[rank].form(
            Generation(number=1, members=members, rank=rank),
            None,  # type: ignore[arg-type]
        ),
    )
    assert time.monotonic() - begun_s < SHM.timeouts.connect_timeout_s / 2
    os.write(done[1], b"x")
    os.waitpid(pid, 0)
    for one in formed:
        one.backend.close()
    for end in (*ready, *done):
        os.close(end)


# Memory.


@pytest.fixture
def alone() -> Iterator[Communicator]:
    with FormedRing(["here"] * 2, SHM) as ring:
        yield ring.communicators[0]


def test_freed_tensors_give_their_memory_back(alone: Communicator) -> None:
    gc.collect()  # what other tests left
    before = shared_kib()
    for _ in range(20):
        tensor = alone.empty((1 << 20, 4), torch.float32)
        tensor.fill_(1)
        del tensor
        gc.collect()
    assert shared_kib() < before + 20 * 1024


def test_tensors_do_not_overlap_and_survive_the_ring(alone: Communicator) -> None:
    tensors = [alone.empty(1000 + at, torch.int64).fill_(at) for at in range(50)]
    del tensors[::3]
    gc.collect()
    tensors += [alone.empty(50_000, torch.int64).fill_(100 + at) for at in range(5)]
    for one in tensors:
        assert bool((one == one[0]).all())
        assert one.data_ptr() % 64 == 0
    assert alone.empty(0, torch.float32).numel() == 0
    assert alone.empty((2, 3)).shape == (2, 3)


def test_a_forked_child_gives_nothing_back(alone: Communicator) -> None:
    tensor = alone.empty(1000, torch.int64).fill_(7)
    pid = os.fork()
    if pid == 0:
        try:
            del tensor
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert bool((tensor == 7).all())


def test_no_shared_memory_left_is_an_error_that_says_so(
    alone: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryError, match="the shared heap of"):
        alone.empty(1 << 50, torch.uint8)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryError, match="no room for 8 MiB of shared memory: the memory limit"):
        alone.empty(8 << 20, torch.uint8)
    room = r"all_reduce\(sum, float32\[1000000\]\): no room for 4 MiB of shared memory"
    with pytest.raises(CollectiveError, match=room):
        alone.all_reduce(torch.zeros(1_000_000))  # needs room for staging


def test_without_memfds_an_unnamed_file_serves_and_says_when_it_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    before = set(os.listdir("/dev/shm"))
    with FormedRing(["here"] * 2, SHM) as ring:
        assert set(os.listdir("/dev/shm")) == before
        total = torch.ones(300_000)
        others = ring.run(lambda comm: comm.all_reduce(total.clone() if comm.rank else total))
        assert others == [None, None]
        assert bool((total == 2).all())
        executor = ring.host_backend(0)._executor  # type: ignore[attr-defined]
        assert os.fstat(executor.group.segment.descriptor).st_mode & 0o777 == 0o600
        monkeypatch.setattr(os, "posix_fallocate", full)
        needed = (
            r"/dev/shm is too small: 8 MiB more are needed and \d+ of its \d+ MiB are free; mount a larger"
        )
        with pytest.raises(MemoryError, match=needed):
            ring.communicators[0].empty(8 << 20, torch.uint8)
    with pytest.raises(SetupError, match="cannot share memory on this host: /dev/shm is too small"):
        FormedRing(["here"] * 2, SHM)
    with pytest.raises(SetupError, match=r"a file in /proc cannot be made .*; mount a tmpfs on /proc"):
        Segment.create(1 << 20, "/proc")


def test_a_name_collision_of_hosts_is_explained() -> None:
    """Two machines of one name cannot reach each other's Unix socket."""
    real, calls = links._name, []

    def elsewhere(token: object, worker_id: int) -> bytes:
        calls.append(worker_id)
        return real(token, worker_id if len(calls) <= 2 else 999)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_name", elsewhere)
        with pytest.raises(SetupError, match=r"has the same host name .* different names \(--host\)"):
            FormedRing(["same", "same"], Config(transport="shm", timeouts=Timeouts(connect_timeout_s=0.5)))


def shared_kib() -> int:
    """Shared memory of this process that is in use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem"):
            return int(line.split()[1])
    raise AssertionError
