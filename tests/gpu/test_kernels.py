"""The kernels on a real GPU: the references' bits, on any stream, without waiting."""

from __future__ import annotations

import pytest
import torch

from ringps.kernels import digest as host_digest
from ringps.kernels.cuda import digest as hashing
from ringps.kernels.cuda.fold import fold
from ringps.kernels.cuda.pack import PackPlan
from tests.kernel_cases import CASES, LARGE_CASES, same, values
from tests.support import require

# The first use of a kernel compiles it.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    require(torch.cuda.is_available(), "there is no CUDA GPU")


@pytest.mark.parametrize("name", CASES)
def test_kernels_have_the_references_bits(name: str) -> None:
    assert same(CASES[name]("cuda"), CASES[name]("cpu"))


@pytest.mark.parametrize("name", LARGE_CASES)
def test_kernels_have_the_references_bits_in_large(name: str) -> None:
    assert same(LARGE_CASES[name]("cuda"), LARGE_CASES[name]("cpu"))


def test_one_plan_serves_several_streams() -> None:
    sizes = [100_000, 7, 50_001]
    starts = [0, 100_032, 100_064]
    plan = PackPlan(sizes, starts, torch.float32, "cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    given = [[values(size, torch.float32, 10 * turn + size) for size in sizes] for turn in range(6)]
    there = [[tensor.cuda() for tensor in tensors] for tensors in given]
    torch.cuda.current_stream().synchronize()
    flats = []
    for turn, sources in enumerate(there):
        with torch.cuda.stream(streams[turn % 3]):
            flat = torch.zeros(160_000, device="cuda")
            plan.pack(sources, flat, 0.5)
            flats.append(flat)
    for stream in streams:
        stream.synchronize()
    for tensors, flat in zip(given, flats, strict=True):
        expected = torch.zeros(160_000)
        PackPlan(sizes, starts, torch.float32, "cpu").pack(tensors, expected, 0.5)
        assert same([flat.cpu()], [expected])


def test_addresses_that_change_from_call_to_call_do_not_mix() -> None:
    """The tables are written anew while earlier launches are still to run."""
    plan = PackPlan([1 << 20], [0], torch.float32, "cuda")
    sources = [torch.full((1 << 20,), float(turn), device="cuda") for turn in range(50)]
    flats = [torch.empty(1 << 20, device="cuda") for _ in sources]
    torch.cuda._sleep(50_000_000)
    for source, flat in zip(sources, flats, strict=True):
        plan.pack([source], flat, None)
    for turn, flat in enumerate(flats):
        assert bool((flat == float(turn)).all())


def test_nothing_waits_for_the_device() -> None:
    plan = PackPlan([1 << 16], [0], torch.float32, "cuda")
    source, flat, out = (torch.ones(1 << 16, device="cuda") for _ in range(3))
    found = torch.empty(2, dtype=torch.int64, device="cuda")

    def everything() -> None:
        plan.pack([source], flat, 0.5)
        plan.unpack(flat, [out])
        fold([flat, source], out, "mean", 2)
        hashing.digest_into(out, found)

    everything()  # compiles
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    everything()
    assert not busy.query(), "a launch waited for what was in the stream before it"
    torch.cuda.synchronize()


def test_hashes_of_several_tensors_on_both_devices() -> None:
    here, there = values(1001, torch.float32, 1), values(50_001, torch.bfloat16, 2)
    first = host_digest.digest(here, there.cuda(), here.cuda())
    assert first == host_digest.digest(here, there.cuda(), here.cuda())
    assert first != host_digest.digest(here, here.cuda(), there.cuda())
    in_parts = host_digest.Digest()
    for part in (here, there.cuda(), here.cuda()):
        in_parts.add(part)
    assert in_parts.value() == first
    assert hashing.digest(there.cuda()) == hashing.digest(there)
