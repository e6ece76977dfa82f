"""A training state as files of a checkpoint, and back: the same bits, each written once."""

from __future__ import annotations

import json
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from ringps.checkpoint import division, tree
from ringps.checkpoint import safetensors as ours
from ringps.checkpoint.contents import Source, assemble, compose
from ringps.checkpoint.division import INDEX, MIB, UNDIVIDED_BYTES, Part, divide
from ringps.checkpoint.packed import ALIGNMENT, Packed, as_tensor, unpack
from ringps.errors import CheckpointError, FrameError
from tests.same import assert_same, raw


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return as_tensor(b"".join(map(raw, tensors)))


# The packed string.


def a_state() -> dict[str, Any]:
    return {
        "step": 7,
        "text": "é\ud800",
        "list": [torch.arange(5.0), torch.empty(0, 3), torch.tensor(2.5), None],
        "bytes": torch.arange(100, dtype=torch.uint8),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "pair": (torch.tensor([1 + 2j], dtype=torch.complex128), torch.ones(3, dtype=torch.bfloat16)),
        "empty at the end": torch.empty(0),
    }


def packed_bytes(state: Any) -> torch.Tensor:
    packed = Packed(tree.flatten(state))
    whole = joined(packed.sources(0, packed.total_bytes))
    assert whole.numel() == packed.total_bytes
    return whole


def test_a_packed_state_comes_back_with_the_same_bits() -> None:
    assert_same(unpack(packed_bytes(a_state())), a_state())


@pytest.mark.parametrize("state", [None, {}, 5, torch.empty(0), [torch.empty(0)] * 3, torch.ones(1)])
def test_small_states_are_packed_too(state: Any) -> None:
    assert_same(unpack(packed_bytes(state)), state)


def test_unpacked_tensors_lie_aligned_in_the_string_itself() -> None:
    whole = packed_bytes(a_state())
    for tensor in [*unpack(whole)["list"][:1], unpack(whole)["bytes"]]:
        inside = tensor.data_ptr() - whole.data_ptr()
        assert 0 < inside < whole.numel()
        assert inside % ALIGNMENT == 0


def test_a_string_from_the_middle_of_a_tensor_is_unpacked() -> None:
    whole = packed_bytes(a_state())
    within = torch.cat([torch.zeros(3, dtype=torch.uint8), whole])[3:]
    assert_same(unpack(within), a_state())


@given(st.data())
def test_any_part_of_the_string_can_be_had(data: st.DataObject) -> None:
    packed = Packed(tree.flatten(a_state()))
    whole = packed_bytes(a_state()).numpy().tobytes()
    start = data.draw(st.integers(0, packed.total_bytes))
    stop = data.draw(st.integers(start, packed.total_bytes))
    assert joined(packed.sources(start, stop)).numpy().tobytes() == whole[start:stop]


def test_the_parts_of_the_string_are_the_live_memory() -> None:
    tensor = torch.zeros(1000)
    packed = Packed(tree.flatten({"x": tensor}))
    sources = packed.sources(0, packed.total_bytes)
    tensor.fill_(3)
    assert_same(unpack(joined(sources))["x"], tensor)


@given(st.data())
def test_a_damaged_string_is_refused_or_reads_as_another_state(data: st.DataObject) -> None:
    whole = packed_bytes(a_state()).clone()
    at = data.draw(st.integers(0, whole.numel() - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, whole.numel()))].clone()
    try:
        unpack(whole)
    except FrameError:
        pass  # and nothing else


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole[:20], "shorter than its head"),
        (lambda whole: whole[:-1], r"has \d+ of its \d+ bytes"),
        (lambda whole: torch.cat([whole, whole[:1]]), r"has \d+ of its \d+ bytes"),
        (lambda whole: with_bytes(whole, 0, b"R"), "does not begin like one"),
        (lambda whole: with_bytes(whole, 8, b"\2"), "version 2, and this ringps reads version 1"),
        (lambda whole: with_bytes(whole, 12, b"\xff\xff\xff\xff"), "longer than the whole"),
        (lambda whole: with_bytes(whole, 16, struct.pack("<Q", 2**63)), "longer than the whole"),
    ],
)
def test_a_wrong_string_is_refused_with_the_reason(
    change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(FrameError, match=reason):
        unpack(change(packed_bytes(a_state())).clone())


def with_bytes(whole: torch.Tensor, at: int, new: bytes) -> torch.Tensor:
    whole = whole.clone()
    whole[at : at + len(new)] = as_tensor(new)
    return whole


# Safetensors.


def of_dtype(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Bits that are valid for any dtype, and different from each other."""
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.arange(size_bytes, dtype=torch.int64).to(torch.uint8)
    return (bits % 2 if dtype is torch.bool else bits).view(dtype).view(shape)


def file_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    named = ours.order(ours.Named(name, value.dtype, tuple(value.shape)) for name, value in tensors.items())
    parts = [as_tensor(ours.header(named)), *(as_tensor(raw(tensors[entry.name])) for entry in named)]
    return joined(parts)


EVERY_DTYPE = {
    f"{name}.{what}": of_dtype(dtype, *shape)
    for name, dtype in ours.DTYPES.items()
    for what, shape in {"matrix": (3, 5), "scalar": (), "empty": (0, 4)}.items()
} | {'é "quoted" 漢': torch.ones(2)}


def test_all_dtypes_of_the_safetensors_package_are_known() -> None:
    assert ours.DTYPES == safetensors.torch._TYPES


def test_the_safetensors_package_reads_our_files() -> None:
    theirs = safetensors.torch.load(file_of(EVERY_DTYPE).numpy().tobytes())
    assert_same({name: theirs[name] for name in EVERY_DTYPE}, EVERY_DTYPE)
    assert len(theirs) == len(EVERY_DTYPE)


def test_we_read_files_of_the_safetensors_package() -> None:
    parsed = ours.parse(as_tensor(safetensors.torch.save(EVERY_DTYPE, metadata={"format": "pt"})))
    assert_same({name: parsed[name] for name in EVERY_DTYPE}, EVERY_DTYPE)
    assert len(parsed) == len(EVERY_DTYPE)


def test_parsed_tensors_share_the_files_memory() -> None:
    whole = file_of({"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.bool)})
    parsed = ours.parse(whole)
    assert parsed["a"].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert list(parsed) == ["a", "b"]


def test_a_tensor_that_lies_across_the_size_of_its_elements_is_read() -> None:
    text = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    body = b"\7" + struct.pack("<2f", 1.5, -2)
    parsed = ours.parse(as_tensor(struct.pack("<Q", len(text)) + text + body))
    assert parsed["float"].tolist() == [1.5, -2]


def file_with(header: Any, body: bytes = b"") -> torch.Tensor:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return as_tensor(struct.pack("<Q", len(text)) + text + body)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (as_tensor(b"1234567"), "shorter than its header"),
        (as_tensor(b"\xff" * 8), "shorter than its header"),
        (as_tensor(struct.pack("<Q", 3) + b"{}"), "shorter than its header"),
        (file_with(b"{"), "not JSON"),
        (file_with(b'{"a": 1, "a": 1}'), "not JSON"),
        (file_with(b"[" * 100_000), "not JSON"),
        (file_with(b"\xff{}"), "not JSON"),
        (file_with([]), "not a JSON object"),
        (file_with({"a": 1}), '"a" is not a tensor'),
        (file_with({"a": entry(more=1)}, bytes(4)), '"a" is not a tensor'),
        (file_with({"a": entry("F33")}, bytes(4)), "dtype unknown"),
        (file_with({"a": entry(shape=[-1])}, bytes(4)), "no shape"),
        (file_with({"a": entry(shape=[1.0])}, bytes(4)), "no shape"),
        (file_with({"a": entry(offsets=[0])}, bytes(4)), "no shape"),
        (file_with({"a": entry(shape=[2])}, bytes(4)), "not as long as its shape"),
        (file_with({"a": entry(shape=[0, 2**62], offsets=[0, 0])}), "not as long as its shape"),
        (file_with({"a": entry()}, bytes(3)), 'ends before "a" does'),
        (file_with({"a": entry()}, bytes(5)), "has 1 bytes that belong to no tensor"),
        (file_with({"a": entry(offsets=[4, 8])}, bytes(8)), "does not begin where"),
        (file_with({"a": entry(), "b": entry()}, bytes(4)), "does not begin where"),
        (file_with({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)), "does not begin where"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(whole: torch.Tensor, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        ours.parse(whole)


@given(st.data())
def test_a_damaged_file_is_refused_or_reads_as_another(data: st.DataObject) -> None:
    whole = file_of({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.int8)}).clone()
    at = data.draw(st.integers(0, whole.numel() - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        ours.parse(whole)
    except FrameError:
        pass  # and nothing else


# Who writes what.

SIZES = st.one_of(
    st.integers(0, 5000), st.integers(0, 40 * MIB), st.sampled_from([0, 1, MIB, UNDIVIDED_BYTES, 3 * 10**9])
)


@given(st.lists(SIZES, max_size=40), st.integers(1, 2**31), st.integers(1, 40))
@example([], 1, 1)
@example([0, 0], 1, 3)
@example([10**10, 1, 1, 1], 1, 8)
def test_every_byte_is_written_once_and_no_rank_writes_much_more(
    weights: list[int], state_bytes: int, world_size: int
) -> None:
    parts = divide(weights, state_bytes, world_size)
    assert [number for part in parts for number in part.weights] == list(range(len(weights)))
    slices = [part for part in parts if part.kind == "state"]
    assert slices[0].start == 0
    assert slices[-1].stop == state_bytes
    for before, after in pairwise(slices):
        assert before.stop == after.start
        assert before.stop % MIB == 0
        assert before.rank < after.rank
    assert all(part.start < part.stop for part in slices)
    assert all(part.weights for part in parts if part.kind == "weights")
    assert len({part.name for part in parts}) == len(parts)
    assert all(0 <= part.rank < world_size for part in parts)

    fair = (sum(weights) + state_bytes) / world_size
    shares = [
        sum(sum(weights[number] for number in part.weights) + part.stop - part.start for part in mine)
        for mine in ([part for part in parts if part.rank == rank] for rank in range(world_size))
    ]
    limit = fair + 1 if sum(weights) > max(fair + 1, UNDIVIDED_BYTES) else max(fair + 1, UNDIVIDED_BYTES)
    assert max(shares) <= limit + max(weights, default=0) + MIB


def test_small_models_are_one_file() -> None:
    assert divide([10 * MIB] * 6, 120 * MIB, 4) == (
        Part("model.safetensors", "weights", 0, tuple(range(6))),
        Part("state-00001-of-00003.bin", "state", 1, start=0, stop=45 * MIB),
        Part("state-00002-of-00003.bin", "state", 2, start=45 * MIB, stop=90 * MIB),
        Part("state-00003-of-00003.bin", "state", 3, start=90 * MIB, stop=120 * MIB),
    )
    assert [part.name for part in divide([5], 9, 1)] == ["model.safetensors", "state.bin"]


def test_weights_longer_than_a_fair_share_are_sharded() -> None:
    parts = divide([MIB] * 300, 600 * MIB, 4)
    assert [(part.name, part.rank) for part in parts] == [
        ("model-00001-of-00002.safetensors", 0),
        ("model-00002-of-00002.safetensors", 1),
        (INDEX, 0),
        ("state-00001-of-00004.bin", 0),
        ("state-00002-of-00004.bin", 1),
        ("state-00003-of-00004.bin", 2),
        ("state-00004-of-00004.bin", 3),
    ]
    assert parts[0].weights == tuple(range(150))


# All of it.


class Tied(nn.Module):
    """Weights of many kinds, two of which are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)  # with a tensor of no dimensions
        self.sixteen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("eighth", torch.ones(4).to(torch.float8_e4m3fn))
        self.register_buffer("wide", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_buffer("narrow", torch.tensor([1 + 2j], dtype=torch.complex64))
        self.register_buffer("none", torch.empty(0, 7))
        for number in range(8):
            self.register_buffer(f"table{number}", torch.full((100,), float(number)))

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": 3, "scales": torch.ones(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


Make = Callable[[Any], torch.optim.Optimizer]
ADAMW: Make = lambda parameters: torch.optim.AdamW(parameters, lr=0.1)  # noqa: E731
SGD: Make = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731


def training_state(make: Make = ADAMW) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"step": 9, "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "extra": [1]}
    return model, optimizer, state


def files_of(state: dict[str, Any], world_size: int = 1) -> dict[str, torch.Tensor]:
    sources = [
        source
        for rank in range(world_size)
        for source in compose(state, {"rank": rank, "rng": torch.get_rng_state()}, rank, world_size).sources
    ]
    assert len({source.name for source in sources}) == len(sources)
    return {source.name: joined(source.tensors) for source in sources}


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are divided as big ones are."""
    monkeypatch.setattr(division, "UNDIVIDED_BYTES", 100)
    monkeypatch.setattr(division, "CUT_BYTES", 64)


def as_restored(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "model": OrderedDict(state["model"])}


@pytest.mark.parametrize("make", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_training_state_comes_back(make: Make, world_size: int) -> None:
    _, _, state = training_state(make)
    contents = assemble(files_of(state, world_size))
    assert_same(contents.state, as_restored(state))
    assert [own["rank"] for own in contents.ranks.values()] == list(range(world_size))
    model, optimizer, _ = training_state(make)
    model.load_state_dict(contents.state["model"])
    optimizer.load_state_dict(contents.state["optimizer"])
    assert_same(dict(model.state_dict()), state["model"])


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_divided_state_comes_back(world_size: int) -> None:
    _, _, state = training_state()
    files = files_of(state, world_size)
    assert sum(name.startswith("model-") for name in files) > 1
    assert sum(name.startswith("state-") for name in files) > 1
    # In any order, and without what was the ranks' own.
    some = dict(sorted(files.items(), reverse=True))
    del some[f"rank-00001-of-{world_size:05d}.bin"]
    contents = assemble(some)
    assert_same(contents.state, as_restored(state))
    assert sorted(contents.ranks) == [rank for rank in range(world_size) if rank != 1]


@pytest.mark.usefixtures("small_shares")
def test_the_index_is_that_of_hugging_face() -> None:
    _, _, state = training_state()
    files = files_of(state, 3)
    index = json.loads(files[INDEX].numpy().tobytes())
    shards = {name: ours.parse(raw) for name, raw in files.items() if name.endswith(".safetensors")}
    assert index["weight_map"] == {weight: name for name, held in shards.items() for weight in held}
    total = sum(tensor.nbytes for held in shards.values() for tensor in held.values())
    assert index["metadata"] == {"total_size": total}


def test_load_file_gives_the_whole_state_dict(tmp_path: Path) -> None:
    model, _, state = training_state()
    (tmp_path / "model.safetensors").write_bytes(files_of(state)["model.safetensors"].numpy().tobytes())
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(state["model"]) - set(loaded) == {"wide", "_extra_state"}
    assert_same(loaded["out.weight"], loaded["embedding.weight"])
    model.load_state_dict(loaded, strict=False)


def test_slices_that_lie_together_are_not_copied(small_shares: None) -> None:
    _, _, state = training_state()
    files = files_of(state, 3)
    names = sorted(name for name in files if name.startswith("state-"))
    together = torch.cat([files[name] for name in names])
    at = 0
    for name in names:
        files[name] = together[at : at + files[name].numel()]
        at += files[name].numel()
    moments = assemble(files).state["optimizer"]["state"]
    assert moments[0]["exp_avg"].untyped_storage().data_ptr() == together.untyped_storage().data_ptr()


def test_compressed_names_are_known() -> None:
    _, _, state = training_state()
    files = {name + ".zst" if name.endswith(".bin") else name: raw for name, raw in files_of(state).items()}
    assert_same(assemble(files).state, as_restored(state))


def test_weights_in_another_order_in_memory_are_stored_contiguous() -> None:
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    model = {"conv": weight, "part": torch.randn(6, 6)[::2, 1:], "conjugate": torch.randn(3).cfloat().conj()}
    restored = assemble(files_of({"model": model, "momentum": weight})).state
    assert_same(dict(restored["model"]), {name: value.resolve_conj() for name, value in model.items()})
    assert restored["model"]["conv"].is_contiguous()
    assert restored["momentum"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "model",
    [{}, {"_extra_state": 5}, {3: torch.ones(2), "__metadata__": torch.ones(1), "a\ud800": torch.ones(1)}],
    ids=["nothing", "no tensors", "names that other tools cannot read"],
)
def test_models_without_weights_for_a_file(model: dict[Any, Any]) -> None:
    files = files_of({"model": model}, 2)
    assert not any(name.startswith("model") for name in files)
    assert_same(assemble(files).state, {"model": OrderedDict(model)})


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match=r'state\["optimizer"\]\["hook"\] is a function'):
        compose({"model": {}, "optimizer": {"hook": a_state}}, None, 0, 1)
    with pytest.raises(TypeError, match=r"own\[0\] is a set"):
        compose({"model": {}}, [set()], 0, 1)
    with pytest.raises(TypeError, match="is a tensor on meta"):
        compose({"model": {"a": torch.ones(1, device="meta")}}, None, 0, 1)


def test_sources_are_the_live_memory() -> None:
    _, _, state = training_state()
    sources: list[Source] = compose(state, None, 0, 1).sources
    assert [source.kind for source in sources] == ["weights", "state", "rank"]
    tensors = [tensor for source in sources for tensor in source.tensors]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert state["model"]["conv.weight"].untyped_storage().data_ptr() in storages
    assert state["optimizer"]["state"][0]["exp_avg"].untyped_storage().data_ptr() in storages
    assert sources[0].size_bytes == joined(sources[0].tensors).numel()


# What is wrong with a set of files.


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(files: dict[str, Any]) -> None:
        for name in names:
            del files[name]

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(files: dict[str, Any]) -> None:
        files[new] = files[old] if new.startswith("state-00009") else files.pop(old)

    return change


def replaced(name: str, new: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    def change(files: dict[str, Any]) -> None:
        assert name in files
        files[name] = new

    return change


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("state-00002-of-00003.bin"), "state-00002-of-00003.bin: is missing"),
        (without("state-00003-of-00003.bin"), "state-00003-of-00003.bin: is missing"),
        (without("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors: is missing"),
        (
            without("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            'the weight "sixteen" is in none of the files',
        ),
        (
            without("state-00001-of-00003.bin", "state-00002-of-00003.bin", "state-00003-of-00003.bin"),
            "state.bin: is missing",
        ),
        (renamed("state-00001-of-00003.bin", "state-00009-of-00003.bin"), "does not belong with"),
        (renamed(INDEX, "notes.txt"), "notes.txt: no file of a checkpoint has such a name"),
        (
            replaced("rank-00000-of-00003.bin", as_tensor(b"")),
            "rank-00000-of-00003.bin: packed state: shorter",
        ),
        (
            replaced("model-00001-of-00002.safetensors", as_tensor(b"")),
            "model-00001-of-00002.safetensors: safetensors: shorter",
        ),
        (
            replaced("model-00001-of-00002.safetensors", file_of({"new": torch.ones(1)})),
            'the weight "sixteen" is in none of the files',
        ),
        (
            replaced("state-00001-of-00003.bin", as_tensor(b"no")),
            "state-00001-of-00003.bin to state-00003-of-00003.bin: packed state: does not begin like one",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    _, _, state = training_state()
    files = files_of(state, 3)
    change(files)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        assemble(files)


@pytest.mark.parametrize(
    ("packed", "weights", "message"),
    [
        (5, {}, r"^state\.bin: is not the state of a training run"),
        ({"model": [1]}, {}, r"^state\.bin: is not the state of a training run"),
        ({"model": {"names": [[]], "others": {}}}, {}, "is in none of the files"),
        ({"model": {"names": [], "others": {}}}, {"a": torch.ones(1)}, 'a weight "a" that the model has not'),
        ({"model": {"names": ["a", "a"], "others": {"a": 1, "b": 1}}}, {}, "that the model has not"),
    ],
)
def test_a_state_that_does_not_fit_its_weights(
    packed: Any, weights: dict[str, torch.Tensor], message: str
) -> None:
    files = {"state.bin": packed_bytes(packed), "model.safetensors": file_of(weights)}
    with pytest.raises(CheckpointError, match=message):
        assemble(files)


def test_a_weight_in_two_files() -> None:
    files = {
        "state.bin": packed_bytes({"model": {"names": ["a"], "others": {}}}),
        "model-00001-of-00002.safetensors": file_of({"a": torch.ones(1)}),
        "model-00002-of-00002.safetensors": file_of({"a": torch.ones(1)}),
    }
    with pytest.raises(
        CheckpointError, match=r'model-00002-of-00002.safetensors: another file has .* "a" too'
    ):
        assemble(files)


def test_the_same_file_compressed_and_not() -> None:
    files = files_of({"model": {}})
    files["state.bin.zst"] = files["state.bin"]
    with pytest.raises(CheckpointError, match=r"state.bin.zst: there is state.bin too"):
        assemble(files)
