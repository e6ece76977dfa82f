"""Collectives against plain torch arithmetic, over every transport."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringps.collectives import Communicator, Handle
from ringps.testing import run_ring
from tests.rings import RINGS, small_chunks

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda stack: stack.sum(0),
    "mean": lambda stack: stack.mean(0),
    "min": lambda stack: stack.amin(0),
    "max": lambda stack: stack.amax(0),
    "prod": lambda stack: stack.prod(0),
}
SHAPES = [(), (0,), (1,), (3,), (2, 5), (7, 11, 3), (1000,)]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


def close(actual: torch.Tensor, stack: torch.Tensor, op: str) -> bool:
    dtype = actual.dtype
    if dtype.is_floating_point:
        expected = PLAIN[op](stack.double())
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        return torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance)
    if dtype is torch.bool:
        return torch.equal(actual, stack.all(0) if op == "min" else stack.any(0))
    return torch.equal(actual, PLAIN[op](stack.long()).to(dtype))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 9),
    st.sampled_from(SHAPES),
    st.sampled_from(
        [(dtype, op) for dtype in FLOATS for op in PLAIN]
        + [(dtype, op) for dtype in INTEGERS for op in PLAIN if op != "mean"]
        + [(torch.bool, "min"), (torch.bool, "max")]
    ),
    st.sampled_from([64, 128, 1024]),
    st.integers(0, 2**31),
)
def test_all_reduce_equals_a_plain_reduction_and_all_ranks_have_the_same_bits(
    world_size: int, shape: tuple[int, ...], kind: tuple[torch.dtype, str], chunk_bytes: int, seed: int
) -> None:
    dtype, op = kind
    inputs = [values(shape, dtype, seed + rank) for rank in range(world_size)]

    def work(ring: Communicator) -> torch.Tensor:
        tensor = inputs[ring.rank].clone()
        ring.all_reduce(tensor, op)
        return tensor

    results = run_ring(world_size, work, small_chunks(chunk_bytes))
    assert close(results[0], torch.stack(inputs), op)
    for result in results:
        assert result.shape == shape
        assert bits(result) == bits(results[0])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_collectives_over_every_transport(name: str, world_size: int) -> None:
    config = small_chunks(64 * 1024)
    inputs = [values((50_001,), torch.float32, rank) for rank in range(world_size)]

    def work(ring: Communicator) -> None:
        rank = ring.rank
        total = torch.stack(inputs).double().sum(0)
        for _ in range(3):
            reduced = inputs[rank].clone()
            ring.all_reduce(reduced)
            assert torch.allclose(reduced.double(), total, atol=1e-5)

            wide = torch.cat([inputs[rank][:999]] * world_size)
            piece = torch.empty(999)
            ring.reduce_scatter(piece, wide)
            assert torch.allclose(piece.double(), total[:999], atol=1e-5)

            gathered = torch.empty(world_size, 50_001)
            ring.all_gather(gathered, inputs[rank])
            assert torch.equal(gathered, torch.stack(inputs))

            for src in range(world_size):
                tensor = inputs[rank].clone()
                ring.broadcast(tensor, src)
                assert torch.equal(tensor, inputs[src])
            ring.barrier()
            assert ring.gather_bytes(b"%d" % rank * rank) == [b"%d" % i * i for i in range(world_size)]

    run_ring(world_size, work, config, transports=RINGS[name](world_size, config))


def test_bits_do_not_depend_on_the_transport() -> None:
    config = small_chunks(4096)

    def work(ring: Communicator) -> bytes:
        tensor = values((10_007,), torch.float32, ring.rank)
        ring.all_reduce(tensor)
        half = values((10_007,), torch.bfloat16, ring.rank)
        ring.all_reduce(half, "mean")
        return bits(tensor) + bits(half)

    results = {
        result
        for name in ("loopback", "tcp")
        for result in run_ring(4, work, config, transports=RINGS[name](4, config))
    }
    assert len(results) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_accumulate_in_float32(dtype: torch.dtype) -> None:
    """Rounding at every hop would lose the small addends, and the sum of a mean would overflow."""

    def work(ring: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.full((9,), 1.0 if ring.rank == 0 else 2.0**-11, dtype=dtype)
        ring.all_reduce(small)
        big = torch.full((9,), 60000.0, dtype=dtype)
        ring.all_reduce(big, "mean")
        return small, big

    for small, big in run_ring(9, work):
        expected = torch.tensor(1 + 8 * 2.0**-11).to(dtype)
        assert torch.equal(small, expected.expand(9))
        assert torch.equal(big, torch.full((9,), 60000.0, dtype=dtype))


@pytest.mark.parametrize("world_size", [1, 3])
def test_non_contiguous_tensors_are_reduced_in_place(world_size: int) -> None:
    def work(ring: Communicator) -> None:
        base = torch.arange(24.0).view(4, 6)
        before = base.clone()
        ring.all_reduce(base.t()[1:3])
        expected = before.clone()
        expected[:, 1:3] *= world_size
        assert torch.equal(base, expected)

        source = torch.full((6, world_size), float(ring.rank)).t()
        output = torch.zeros(6, 2)[:, 0]
        ring.reduce_scatter(output, source.contiguous().t().contiguous().t())
        assert torch.equal(output, torch.full((6,), sum(range(world_size)) * 1.0))

        gathered = torch.zeros(2 * world_size, 4).t()
        ring.all_gather(gathered, torch.full((8,), float(ring.rank)))
        assert torch.equal(gathered.reshape(-1), torch.arange(world_size).repeat_interleave(8).float())

        strided = torch.zeros(10)[::2]
        strided += ring.rank
        ring.broadcast(strided, src=world_size - 1)
        assert torch.equal(strided, torch.full((5,), world_size - 1.0))

    run_ring(world_size, work)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.int64]
)
def test_broadcast_and_all_gather_take_any_dtype(dtype: torch.dtype) -> None:
    def work(ring: Communicator) -> None:
        tensor = torch.full((5,), ring.rank % 2).to(dtype)
        gathered = torch.zeros(15).to(dtype)
        ring.all_gather(gathered, tensor)
        assert bits(gathered) == bits(torch.tensor([0] * 5 + [1] * 5 + [0] * 5).to(dtype))
        ring.broadcast(tensor, src=1)
        assert bits(tensor) == bits(torch.ones(5).to(dtype))

    run_ring(3, work)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_asynchronous_collectives_overlap_and_end_in_order(world_size: int) -> None:
    def work(ring: Communicator) -> None:
        tensors = [torch.full((3000,), float(i)) for i in range(40)]
        handles = [ring.all_reduce(tensor, async_op=True) for tensor in tensors]
        assert all(isinstance(handle, Handle) for handle in handles)
        handles[-1].wait()
        assert all(handle.done() for handle in handles)
        for i, tensor in enumerate(tensors):
            assert torch.equal(tensor, torch.full((3000,), float(i * world_size)))

    run_ring(world_size, work, small_chunks(1024))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_into_leaves_its_input_alone(world_size: int) -> None:
    def work(ring: Communicator) -> None:
        source = values((5000,), torch.float32, ring.rank)
        before = source.clone()
        output = torch.full_like(source, float("nan"))
        ring.all_reduce_into(output, source, "mean", label="bucket 0").wait()
        assert torch.equal(source, before)
        expected = torch.stack([values((5000,), torch.float32, r) for r in range(world_size)]).mean(0)
        assert torch.allclose(output, expected, atol=1e-6)

    run_ring(world_size, work, small_chunks(4096))


def test_wrong_arguments_are_value_errors_and_harm_nothing() -> None:
    def work(ring: Communicator) -> None:
        one = torch.ones(4)
        wrong: list[Callable[[], object]] = [
            lambda: ring.all_reduce(one, "avg"),
            lambda: ring.all_reduce(torch.ones(4, dtype=torch.int32), "mean"),
            lambda: ring.all_reduce(torch.ones(4, dtype=torch.bool)),
            lambda: ring.all_reduce(torch.ones(4, dtype=torch.complex64)),
            lambda: ring.all_reduce(torch.ones(4, device="meta")),
            lambda: ring.all_reduce(torch.ones(4).to_sparse()),
            lambda: ring.all_reduce_into(torch.ones(5), one),
            lambda: ring.all_reduce_into(torch.ones(4, 2)[:, 0], one),
            lambda: ring.reduce_scatter(one, one),
            lambda: ring.all_gather(one, one),
            lambda: ring.all_gather(torch.ones(8, dtype=torch.int32), one),
            lambda: ring.broadcast(one, src=2),
            lambda: ring.broadcast(one, src=-1),
        ]
        for call in wrong:
            with pytest.raises(ValueError):
                call()
        ring.all_reduce(one)
        assert torch.equal(one, torch.full((4,), 2.0))

    run_ring(2, work)


def test_tensors_that_require_grad_are_reduced_outside_autograd() -> None:
    def work(ring: Communicator) -> None:
        weight = torch.ones(3, requires_grad=True)
        ring.all_reduce(weight)
        assert torch.equal(weight.detach(), torch.full((3,), 2.0))
        assert weight.grad_fn is None

    run_ring(2, work)
