"""Kernels for GPUs: what the references do, that both agree to the bit, that a GPU's compiler takes them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ringps.errors import SetupError
from ringps.kernels import digest as host_digest
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.cuda import digest as hashing
from ringps.kernels.cuda import launch
from ringps.kernels.cuda.fold import fold
from ringps.kernels.cuda.pack import PackPlan
from ringps.kernels.cuda.quantize import dequantize, dequantize_add, quantize
from ringps.kernels.fold import fold_of
from tests.kernel_cases import CASES, FLOATS, HALVES, INTEGERS, OPS, same, spoil, values
from tests.support import require

_ROOT = Path(__file__).parents[2]


def _run(module: str, *arguments: str, **environment: str) -> list[list[object]]:
    require(importlib.util.find_spec("triton") is not None, "Triton is not installed")
    found = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


# Kernel against reference


def test_interpreted_kernels_have_the_references_bits() -> None:
    outcomes = {str(name): outcome for name, outcome in _run("tests.interpreted_kernels")}
    assert outcomes.keys() == CASES.keys()
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "same"} == {}


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    rows = _run("tests.compiled_kernels", "90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    by_kernel: dict[tuple[str, str], set[str]] = {}
    for case, kernel, _, size_bytes, instructions in rows:
        assert isinstance(size_bytes, int) and isinstance(instructions, list)
        assert size_bytes > 0
        by_kernel.setdefault((str(case), str(kernel)), set()).update(instructions)
    assert {kernel for _, kernel in by_kernel} == {
        "pack",
        "unpack",
        "fold",
        "digest",
        "quantize",
        "dequantize",
    }
    everything = set().union(*by_kernel.values())
    # Neither fused multiply-adds, nor approximations, nor subnormals taken for zero.
    assert not {name for name in everything if name.startswith("fma") or "approx" in name or "ftz" in name}
    assert not {name for name in everything if name.startswith("div") and ".rn." not in name}
    for aligned in ("pack float32", "fold 17 inputs of float32", "fold mean of bfloat16", "fold sum of int8"):
        for (case, _), instructions in by_kernel.items():
            if case == aligned:
                assert {"ld.global.v4.b32", "st.global.v4.b32"} <= instructions
    # A new weight, or another number of bytes, compiles nothing.
    assert len([row for row in rows if row[:2] == ["pack float32", "pack"]]) == 2
    assert len([row for row in rows if row[:2] == ["digest small", "digest"]]) <= 2


def test_importing_ringps_does_not_import_triton() -> None:
    code = (
        "import sys, ringps, ringps.runtime, ringps.kernels.cuda.pack, ringps.kernels.cuda.fold, "
        "ringps.kernels.cuda.quantize, ringps.kernels.digest; "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT).returncode == 0


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    plan = PackPlan([4], [0], torch.float32, "cpu")
    calls: list[Callable[[], object]] = [
        lambda: plan.pack([torch.ones(4)], torch.empty(4), None),
        lambda: fold([torch.ones(4)] * 2, torch.empty(4), "sum", 2),
        lambda: hashing.digest(torch.ones(4)),
        lambda: quantize(torch.ones(4), torch.empty(4, dtype=torch.int8), torch.empty(1)),
    ]
    for call in calls:
        call()
        with launch.kernels_everywhere(), pytest.raises(SetupError, match="pip install triton"):
            call()


# Packing


@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [None, 1 / 3, 0.0])
def test_packing_multiplies_as_torch_does(source_dtype: torch.dtype, weight: float | None) -> None:
    for flat_dtype in FLOATS:
        source = spoil(values(300, source_dtype, 1))
        flat = torch.full((700,), 7.0, dtype=flat_dtype)
        PackPlan([300, 5, 8], [16, 400, 500], flat_dtype, "cpu").pack(
            [source, None, torch.ones(2, 4)], flat, weight
        )
        product = source if weight is None else torch.mul(source, weight)
        expected = torch.full((700,), 7.0, dtype=flat_dtype)
        expected[16:316] = product
        expected[400:405] = 0
        expected[500:508] = torch.mul(torch.ones(8), 1.0 if weight is None else weight)
        assert same([flat], [expected])


def test_unpacking_gives_back_what_was_packed() -> None:
    given = [
        values(size, dtype, 3)
        for size, dtype in ((100, torch.float16), (1, torch.float32), (0, torch.float64))
    ]
    plan = PackPlan([100, 1, 0], [32, 0, 7], torch.float32, "cpu")
    flat = torch.zeros(200)
    plan.pack(given, flat, None)
    targets = [torch.full_like(tensor, 9.0) for tensor in given]
    plan.unpack(flat, [None, *targets[1:]])
    assert same(targets[1:], given[1:])
    assert bool((targets[0] == 9.0).all())
    plan.unpack(flat, targets)
    assert same(targets, given)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PackPlan([4, 4], [0, 3], torch.float32, "cpu"), "the next begins at 3"),
        (lambda: PackPlan([4], [-1], torch.float32, "cpu"), "negative"),
        (lambda: PackPlan([4], [0], torch.int32, "cpu"), "cannot pack into torch.int32"),
        (lambda: PackPlan([4], [], torch.float32, "cpu"), "1 sizes and 0 starts"),
        (lambda: _plan().pack([torch.ones(5)], torch.ones(4)), "source 0 has 5 elements"),
        (lambda: _plan().pack([torch.ones(4).int()], torch.ones(4)), "torch.int32"),
        (lambda: _plan().pack([torch.ones(8)[::2]], torch.ones(4)), "source 0 must be contiguous"),
        (lambda: _plan().pack([], torch.ones(4)), "0 sources for a plan of 1"),
        (lambda: _plan().pack([None], torch.ones(3)), "at least 4 elements"),
        (lambda: _plan().unpack(torch.ones(4).half(), [None]), "the plan is for torch.float32"),
        (lambda: _plan().unpack(torch.ones(4), [torch.ones(3)]), "target 0 has 3 elements"),
        (lambda: _plan().pack([torch.ones(4, device="meta")], torch.ones(4)), "source 0 is on meta"),
    ],
)
def test_a_plan_refuses_what_it_is_not_for(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def _plan() -> PackPlan:
    return PackPlan([4], [0], torch.float32, "cpu")


# Folding


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_folding_has_the_bits_of_a_ring(dtype: torch.dtype, op: ReduceOp) -> None:
    if (op == "mean" and not dtype.is_floating_point) or (dtype is torch.bool and op not in ("min", "max")):
        with pytest.raises(ValueError, match=r"reduce|mean"):
            fold([torch.zeros(2, dtype=dtype)] * 2, torch.zeros(2, dtype=dtype), op, 2)
        return
    inputs = [values(500, dtype, rank) for rank in range(5)]
    folding = fold_of(dtype, op)
    partial, expected = folding.scratch(500), torch.empty(500, dtype=dtype)
    with np.errstate(all="ignore"):
        folding.partial(folding.of(inputs[0]), folding.of(inputs[1]), folding.partial_of(partial))
        for tensor in inputs[2:]:
            block = folding.partial_of(partial)
            folding.partial(block, folding.of(tensor), block)
        folding.finish(folding.partial_of(partial), folding.of(expected), 5)
        out = torch.empty(500, dtype=dtype)
        fold(inputs, out, op, 5)
        assert same([out], [expected])
        for position in range(5):
            copies = [tensor.clone() for tensor in inputs]
            fold(copies, copies[position], op, 5)
            assert same([copies[position]], [expected])
            assert same(copies[:position], inputs[:position])
            assert same(copies[position + 1 :], inputs[position + 1 :])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_folding_in_parts_rounds_once(dtype: torch.dtype) -> None:
    inputs = [values(500, dtype, rank) for rank in range(4)]
    whole, parts, partial = torch.empty(500, dtype=dtype), torch.empty(500, dtype=dtype), torch.empty(500)
    fold(inputs, whole, "mean", 4)
    fold(inputs[:3], partial, "mean")
    fold([partial, inputs[3]], parts, "mean", 4)
    assert same([parts], [whole])


@pytest.mark.parametrize(
    ("inputs", "out", "match"),
    [
        ([], torch.ones(2), "nothing to fold"),
        ([torch.ones(2), torch.ones(3)], torch.ones(3), "input 0 has 2 elements"),
        ([torch.ones(2), torch.ones(2).half()], torch.ones(2).double(), "the output is torch.float64"),
        ([torch.ones(2).double(), torch.ones(2)], torch.ones(2), "input 0 is torch.float64"),
        ([torch.ones(4)[::2]], torch.ones(2), "input 0 must be contiguous"),
        ([torch.ones(2)], torch.ones(4)[::2], "the output must be contiguous"),
    ],
)
def test_folding_refuses_what_does_not_fit(inputs: list[torch.Tensor], out: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fold(inputs, out, "sum", 2)


# Hashing


def test_a_hash_tells_any_change() -> None:
    given = values(601, torch.uint8, 1)
    hashes = {hashing.digest(given)}
    for bit in range(given.numel() * 8):
        changed = given.clone()
        changed[bit // 8] ^= 1 << bit % 8
        hashes.add(hashing.digest(changed))
    assert len(hashes) == 1 + given.numel() * 8
    words = given[:600].view(torch.int64)
    assert hashing.digest(words) != hashing.digest(words.roll(1))
    swapped = words.clone()
    swapped[[3, 60]] = words[[60, 3]]
    assert hashing.digest(words) != hashing.digest(swapped)
    assert hashing.digest(given) != hashing.digest(torch.cat((given[1:], given[:1])))


def test_hashes_tell_lengths_of_zeros() -> None:
    assert len({hashing.digest(torch.zeros(size, dtype=torch.uint8)) for size in range(200)}) == 200


def test_both_halves_of_a_hash_spread() -> None:
    """A counter's hashes differ from each other in about half of each half's bits."""
    hashes = [hashing.digest(torch.tensor([number])) for number in range(300)]
    for half in (slice(0, 8), slice(8, 16)):
        numbers = [int.from_bytes(found[half], "little") for found in hashes]
        flips = [(one ^ other).bit_count() for one, other in pairwise(numbers)]
        assert 28 < sum(flips) / len(flips) < 36
        for bit in range(64):
            assert 0.3 < sum(number >> bit & 1 for number in numbers) / len(numbers) < 0.7


def test_a_hash_depends_on_bytes_alone() -> None:
    given = values(1001, torch.float32, 1)
    octets = given.view(torch.uint8)
    room = torch.empty(octets.numel() + 3, dtype=torch.uint8)
    room[3:] = octets
    assert hashing.digest(given) == hashing.digest(octets) == hashing.digest(room[3:])
    assert hashing.digest(given[:1000].view(10, 100).t()) == hashing.digest(
        given[:1000].view(10, 100).t().contiguous()
    )


def test_a_hash_of_many_blocks_is_the_sum_of_its_words() -> None:
    """By the definition, in Python's integers."""
    given = values(300_005, torch.uint8, 1)
    octets = given.numpy().tobytes()
    whole = len(octets) // 8 * 8
    words = [len(octets), int.from_bytes(octets[whole:], "little")]
    words += [int(word) for word in np.frombuffer(octets[:whole], "<u8")]
    mask, sums = (1 << 64) - 1, [0, 0]
    for number, word in enumerate(words):
        mixed = word ^ (number * hashing.PLACE + hashing.SEED) & mask
        mixed = (mixed ^ mixed >> 32) * hashing.WORD & mask
        mixed ^= mixed >> 29
        first = mixed * hashing.FIRST & mask
        second = (mixed ^ hashing.TURN) * hashing.SECOND & mask
        sums[0] += first ^ first >> 32
        sums[1] += second ^ second >> 31
    assert hashing.digest(given) == b"".join((total & mask).to_bytes(8, "little") for total in sums)


def test_hashing_refuses_what_it_cannot_write_to() -> None:
    with pytest.raises(ValueError, match="a hash is two int64"):
        hashing.digest_into(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="contiguous"):
        hashing.digest_into(torch.ones(4)[::2], torch.zeros(2, dtype=torch.int64))


def test_a_digest_takes_a_value_hashed_elsewhere() -> None:
    given = host_digest.Digest()
    given.give(bytes(range(16)))
    assert given.fed
    assert given.value() == bytes(range(16))
    with pytest.raises(AssertionError, match="given as a whole"):
        given.add(torch.ones(2))
    fed = host_digest.Digest()
    fed.add(torch.ones(2))
    with pytest.raises(AssertionError, match="added already"):
        fed.give(bytes(16))
    with pytest.raises(AssertionError, match="16 bytes, not 3"):
        host_digest.Digest().give(b"abc")


# Quantising


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_decoding_is_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    x = torch.randn(5003, generator=torch.Generator().manual_seed(1)).mul(100).to(dtype)
    encoded, scales, decoded = torch.empty(5003, dtype=torch.int8), torch.empty(20), torch.empty(5003)
    quantize(x, encoded, scales)
    dequantize(encoded, scales, decoded)
    allowed = scales.repeat_interleave(256)[:5003] / 2 * (1 + 1e-5)
    assert bool(((x.float() - decoded).abs() <= allowed).all())
    assert int(encoded.abs().amax()) == 127
    added = torch.ones(5003, dtype=dtype)
    dequantize_add(encoded, scales, added)
    assert same([added], [(1 + decoded).to(dtype)])


def test_quantising_rounds_half_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0])
    encoded, scales = torch.empty(7, dtype=torch.int8), torch.empty(1)
    quantize(x, encoded, scales)
    assert scales.item() == 1.0
    assert encoded.tolist() == [127, 0, 2, 2, 0, -2, -127]


def test_zeros_and_what_is_not_finite_show_after_decoding() -> None:
    x = torch.ones(1024)
    x[:256], x[300], x[600], x[601] = 0.0, float("nan"), float("inf"), 2.0
    encoded, scales, decoded = torch.empty(1024, dtype=torch.int8), torch.empty(4), torch.empty(1024)
    quantize(x, encoded, scales)
    dequantize(encoded, scales, decoded)
    assert bool((decoded[:256] == 0).all())
    assert bool(decoded[256:768].isnan().all())
    assert bool((decoded[768:] == 1).all())


def test_quantising_refuses_what_does_not_fit() -> None:
    x, encoded, scales = torch.ones(300), torch.empty(300, dtype=torch.int8), torch.empty(2)
    with pytest.raises(ValueError, match="power of two"):
        quantize(x, encoded, scales, 100)
    with pytest.raises(ValueError, match="need as many values and 2 scales; there are 300 and 1"):
        quantize(x, encoded, scales[:1])
    with pytest.raises(ValueError, match=r"cannot quantise torch\.float64"):
        dequantize(encoded, scales, x.double())
