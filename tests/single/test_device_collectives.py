"""Collectives on tensors of GPUs, on pretended ones: every way, over every kind of host backend."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from ringps.collectives import Communicator
from ringps.collectives.device import backend as device_backend
from ringps.collectives.device.choice import Equipment, choose_way
from ringps.collectives.device.staging import pieces_of
from ringps.config import Config, Exchange, TransportName
from ringps.errors import CollectiveMismatchError, PeerLostError, RingpsError, SetupError
from ringps.kernels.digest import Digest, digest
from ringps.testing.pretend import PretendAccelerator
from tests.formed import FormedRing
from tests.pretended import PretendNccl, WayOf, gpus

SMALL = Exchange(staging_bytes=4096, chunk_bytes=1024)

Case = tuple[WayOf, TransportName, tuple[str, ...]]
CASES: dict[str, Case] = {
    "nccl": ("nccl", "auto", ("a", "a", "a")),
    "nccl between hosts": ("nccl", "auto", ("a", "b")),
    "cuda_ipc": ("cuda_ipc", "auto", ("a", "a", "a")),
    "staged, shared memory": ("staged", "auto", ("a", "a")),
    "staged, tcp": ("staged", "tcp", ("a", "b", "c")),
    "staged, zmq": ("staged", "zmq", ("a", "b")),
    "staged, hierarchical": ("staged", "auto", ("a", "a", "b")),
    "staged, as asked": ("cuda_ipc", "shm", ("a", "a")),
}


@pytest.fixture(autouse=True)
def say_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_backend, "_said", set())


def run(
    case: Case, script: Callable[[Communicator, PretendAccelerator], object], *, seed: int | None = 1
) -> list[object]:
    """`script` on every rank, each with a pretended GPU whose streams dawdle at random."""
    way, transport, hosts = case
    with gpus(len(hosts), way, seed=seed) as made:
        config = Config(transport=transport, exchange=SMALL)
        with FormedRing(hosts, config) as ring:
            return ring.run(lambda comm: script(comm, made[comm.rank]))


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return (torch.rand(numel, generator=generator) * 8 - 4).to(dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_collective_gives_what_it_gives_in_the_cpus_memory(case: Case) -> None:
    """Of sizes from nothing to many pieces; all ranks get the same bits."""

    def script(comm: Communicator, gpu: PretendAccelerator) -> list[bytes]:
        found = []
        for numel in (0, 1, 7, 1024, 9001):
            own = values(comm.rank, numel)
            on_gpu, on_cpu = gpu.copy(own), own.clone()
            comm.all_reduce(on_gpu, "sum")
            comm.all_reduce(on_cpu, "sum")
            torch.testing.assert_close(on_gpu.clone(), on_cpu)
            found.append(digest(on_gpu.clone()))

            many = values(comm.rank, numel * comm.world_size)
            part, expected = gpu.copy(torch.empty(numel)), torch.empty(numel)
            comm.reduce_scatter(part, gpu.copy(many), "max")
            comm.reduce_scatter(expected, many, "max")
            assert torch.equal(part, expected)

            whole, expected = gpu.copy(torch.empty(numel * comm.world_size)), torch.empty(many.shape)
            comm.all_gather(whole, gpu.copy(own))
            comm.all_gather(expected, own)
            assert torch.equal(whole, expected)

            for src in range(comm.world_size):
                mine = gpu.copy(own)
                comm.broadcast(mine, src)
                assert torch.equal(mine, values(src, numel))
        return found

    assert len({tuple(rank) for rank in run(case, script)}) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    op = "min" if dtype is torch.bool else "sum"

    def script(comm: Communicator, gpu: PretendAccelerator) -> None:
        own = values(comm.rank, 3000).to(dtype)
        on_gpu, on_cpu = gpu.copy(own), own.clone()
        comm.all_reduce(on_gpu, op)
        comm.all_reduce(on_cpu, op)
        torch.testing.assert_close(on_gpu.clone(), on_cpu)

    run(case, script)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_out_of_place_in_the_background_with_a_hash(case: Case) -> None:
    """Several at once, amid others in the CPU's memory; the hash is the same on all ranks, inputs are
    unharmed."""

    def script(comm: Communicator, gpu: PretendAccelerator) -> list[bytes]:
        inputs = [gpu.copy(values(comm.rank, numel)) for numel in (5000, 3, 2500)]
        outputs = [gpu.copy(torch.full_like(one, torch.nan)) for one in inputs]
        digests = [Digest() for _ in inputs]
        ended: list[int] = []
        handles = []
        for at, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
            handles.append(
                comm.all_reduce_into(
                    output,
                    given,
                    "mean",
                    label=f"bucket {at}",
                    then=lambda at=at: ended.append(at),  # type: ignore[misc]
                    digest=digests[at],
                )
            )
            beside = torch.full((3,), float(comm.rank))
            comm.all_reduce(beside)
            assert beside.tolist() == [sum(range(comm.world_size))] * 3
        for handle in handles:
            handle.wait(20)
        assert sorted(ended) == [0, 1, 2]
        for numel, given, output in zip((5000, 3, 2500), inputs, outputs, strict=True):
            assert torch.equal(given, values(comm.rank, numel))
            expected = sum(values(rank, numel) for rank in range(comm.world_size)) / comm.world_size
            torch.testing.assert_close(output.clone(), expected)
        assert all(one.fed for one in digests)
        return [one.value() for one in digests]

    assert len({tuple(rank) for rank in run(case, script)}) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tensors_with_strides_and_those_of_the_ring_itself(case: Case) -> None:
    def script(comm: Communicator, gpu: PretendAccelerator) -> None:
        strided = gpu.copy(values(comm.rank, 60).view(6, 10))[:, ::2]
        comm.all_reduce(strided)
        expected = sum(values(rank, 60).view(6, 10)[:, ::2] for rank in range(comm.world_size))
        torch.testing.assert_close(strided.clone(), expected)
        near = gpu.copy(torch.zeros(1))
        own = comm.empty_beside(near, (3, 4), torch.float32)
        assert gpu.owns(own) == (gpu.peer_memory is not None and len(set(case[2])) == 1)

    run(case, script)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_different_calls_are_named(case: Case) -> None:
    def script(comm: Communicator, gpu: PretendAccelerator) -> str:
        comm.all_reduce(gpu.copy(torch.zeros(4)))
        with pytest.raises(RingpsError) as caught:
            comm.all_reduce(gpu.copy(torch.zeros(100 + comm.rank)))
        return f"{type(caught.value).__name__}: {caught.value}"

    for text in run(case, script):
        assert CollectiveMismatchError.__name__ in str(text)
        assert "float32[100]" in str(text)
        assert "float32[101]" in str(text)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loss_ends_what_is_under_way(case: Case) -> None:
    """One rank never comes to the second collective."""
    way, transport, hosts = case
    with gpus(len(hosts), way, seed=3) as made:
        config = Config(transport=transport, exchange=SMALL)
        with FormedRing(hosts, config) as ring:
            started = threading.Barrier(len(hosts))

            def script(comm: Communicator) -> None:
                gpu = made[comm.rank]
                comm.all_reduce(gpu.copy(torch.zeros(4)))
                if comm.rank == 0:
                    started.wait(20)
                    ring.lose(0)
                    return
                own, output = gpu.copy(torch.ones(9000)), gpu.copy(torch.zeros(9000))
                handle = comm.all_reduce_into(output, own)
                started.wait(20)
                with pytest.raises(PeerLostError):
                    handle.wait(20)
                assert handle.done()
                assert torch.equal(own, torch.ones(9000))
                with pytest.raises(PeerLostError):
                    comm.all_reduce(gpu.copy(torch.zeros(4)))

            ring.run(script)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draining_waits_for_what_nobody_has_waited_for(case: Case) -> None:
    """So that a rank that leaves takes nothing away from the others."""
    way, transport, hosts = case
    config = Config(transport=transport, exchange=SMALL)
    with gpus(len(hosts), way, seed=4) as made, FormedRing(hosts, config) as ring:

        def script(comm: Communicator) -> None:
            tensor = made[comm.rank].copy(torch.ones(9000))
            comm.all_reduce(tensor, async_op=True)
            ring.backends[comm.rank].drain()
            assert torch.equal(tensor, torch.full((9000,), float(comm.world_size)))

        ring.run(script)


def test_a_ring_of_one_has_its_result() -> None:
    def script(comm: Communicator, gpu: PretendAccelerator) -> None:
        own, output, hashed = gpu.copy(values(0, 300)), gpu.copy(torch.zeros(300)), Digest()
        comm.all_reduce_into(output, own, digest=hashed).wait()
        assert torch.equal(output, own)
        assert hashed.fed
        comm.all_reduce(own)
        assert torch.equal(own, values(0, 300))

    run(("cuda_ipc", "auto", ("a",)), script)


def test_what_is_chosen_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run(("nccl", "auto", ("a", "a")), lambda comm, gpu: comm.all_reduce(gpu.copy(torch.zeros(1))))
    said = [line for line in capfd.readouterr().err.splitlines() if "GPU tensors" in line]
    assert said == ["ringps: GPU tensors: nccl (auto: every worker has a GPU of its own)"]


def test_what_does_not_work_is_said_and_auto_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    with gpus(2, "nccl") as made:
        made[1]._nccl = PretendNccl(connects=False)
        made[0]._nccl = PretendNccl(connects=False)
        with FormedRing(("a", "b")) as ring:

            def script(comm: Communicator) -> None:
                tensor = made[comm.rank].copy(torch.ones(3))
                comm.all_reduce(tensor)
                assert tensor.tolist() == [2, 2, 2]

            ring.run(script)
    said = capfd.readouterr().err
    assert "GPU tensors: nccl (nccl does not work at rank 0: the pretended network is down)" in said
    assert "GPU tensors: staged (auto: no NCCL: NCCL did not connect; no CUDA IPC: " in said


def test_memory_that_one_rank_cannot_open_is_noticed_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the same other way."""
    with gpus(3, "cuda_ipc") as made:

        def refuse(handle: bytes, size_bytes: int) -> torch.Tensor:
            raise RuntimeError("mapping of buffer object failed")

        monkeypatch.setattr(made[1]._memory, "open", refuse)
        with FormedRing(("a", "a", "a")) as ring:

            def script(comm: Communicator) -> str:
                tensor = made[comm.rank].copy(torch.ones(3))
                for _ in range(2):
                    comm.all_reduce(tensor)
                assert tensor.tolist() == [9, 9, 9]
                backend = ring.backends[comm.rank]
                return type(backend._way).__name__  # type: ignore[attr-defined]

            assert ring.run(script) == ["Staging"] * 3


def test_what_was_asked_for_and_does_not_work_is_an_error() -> None:
    with gpus(2, "nccl") as made:
        for one in made:
            one._nccl = PretendNccl(connects=False)
        with FormedRing(("a", "b"), Config(transport="nccl")) as ring:

            def script(comm: Communicator) -> None:
                with pytest.raises(SetupError, match="nccl does not work at rank 0: the pretended network"):
                    comm.all_reduce(made[comm.rank].copy(torch.ones(3)))

            ring.run(script)


def test_tensors_on_two_devices_are_refused() -> None:
    def script(comm: Communicator, gpu: PretendAccelerator) -> None:
        with pytest.raises(ValueError, match="input and output must be on one device"):
            comm.all_gather(gpu.copy(torch.zeros(2 * comm.world_size)), torch.zeros(2))

    run(("nccl", "auto", ("a", "a")), script)


def equipped(
    *devices: str, nccl: tuple[int, int, int] | None = (2, 30, 7), shares: bool = True
) -> list[Equipment]:
    missing = "" if nccl else "no file"
    return [Equipment(device=one, nccl=nccl, no_nccl=missing, shares=shares) for one in devices]


APART, TOGETHER = [[0], [1]], [[0, 1]]


@pytest.mark.parametrize(
    ("asked", "equipment", "hosts", "way", "reason"),
    [
        ("auto", equipped("x", "y"), APART, "nccl", "every worker has a GPU of its own"),
        ("auto", equipped("x", "x"), TOGETHER, "cuda_ipc", "ranks 0 and 1 share a GPU"),
        ("auto", equipped("x", "y", nccl=None), TOGETHER, "cuda_ipc", "rank 0 has none \\(no file\\)"),
        ("auto", equipped("x", "y", nccl=None), APART, "staged", "the workers are on 2 hosts"),
        (
            "auto",
            equipped("x", "x", shares=False),
            TOGETHER,
            "staged",
            "rank 0's GPU cannot be opened",
        ),
        ("nccl", equipped("x", "y"), TOGETHER, "nccl", "as asked"),
        ("cuda_ipc", equipped("x", "y"), TOGETHER, "cuda_ipc", "as asked"),
        ("tcp", equipped("x", "y"), TOGETHER, "staged", "over tcp"),
        ("shm", equipped("x", "x"), TOGETHER, "staged", "over shm"),
        ("auto", equipped("x"), [[0]], "alone", "a ring of one"),
    ],
)
def test_choices(
    asked: TransportName, equipment: list[Equipment], hosts: Sequence[Sequence[int]], way: str, reason: str
) -> None:
    found = choose_way(asked, equipment, hosts)
    assert found.name == way
    assert re.search(reason, found.reason)


@pytest.mark.parametrize(
    ("asked", "equipment", "hosts", "text"),
    [
        ("nccl", equipped("x", "x"), TOGETHER, "ranks 0 and 1 share a GPU"),
        ("nccl", equipped("x", "y", nccl=None), TOGETHER, "rank 0 has none"),
        ("cuda_ipc", equipped("x", "y"), APART, "on 2 hosts"),
    ],
)
def test_choices_that_cannot_be_had(
    asked: TransportName, equipment: list[Equipment], hosts: Sequence[Sequence[int]], text: str
) -> None:
    with pytest.raises(SetupError, match=text):
        choose_way(asked, equipment, hosts)


def test_other_versions_of_nccl_do_not_meet() -> None:
    one, other = equipped("x", "y")
    found = choose_way("auto", [one, replace(other, nccl=(2, 27, 1))], APART)
    assert found.name == "staged"
    assert "rank 0 has version 2.30.7, rank 1 2.27.1" in found.reason


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "broadcast"])
@pytest.mark.parametrize("numel", [0, 1, 10, 11, 25])
def test_pieces_cover_everything_once(kind: str, numel: int) -> None:
    world_size, most = 3, 10
    pieces = list(pieces_of(kind, numel, most, world_size, sends=True))
    spread = world_size if kind in ("all_gather", "reduce_scatter") else 1
    down = [index for piece in pieces for start, stop, _ in piece.down for index in range(start, stop)]
    up = [at + index for piece in pieces for at, start, stop in piece.up for index in range(stop - start)]
    assert sorted(down) == list(range(numel * (spread if kind == "reduce_scatter" else 1)))
    expected = numel * (spread if kind == "all_gather" else 1)
    assert sorted(up) == list(range(0 if kind == "broadcast" else expected))
    for piece in pieces:
        assert max(piece.source_numel, piece.output_numel) <= most
