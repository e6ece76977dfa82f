"""Nested state to bytes and tensors and back: the same types, the same bits, and nothing else."""

from __future__ import annotations

import functools
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers

from ringps.checkpoint import dtypes, pieces, tree
from ringps.checkpoint.pieces import ALIGNMENT, Layout, Pieces, TensorSpec
from ringps.errors import FrameError
from tests.same import assert_same, raw


def there_and_back(state: Any) -> Any:
    taken = tree.flatten(state)
    copies = Pieces.allocate(Layout(TensorSpec(t.dtype, tuple(t.shape)) for t in taken.tensors))
    originals = Pieces(taken.tensors)
    for piece in range(copies.layout.piece_count):
        copies.copy_from(originals, piece)
    return tree.unflatten(taken.skeleton, copies.tensors)


# Values.

KEYS = st.text() | st.integers()
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters())  # with lone surrogates
    | st.binary()
    | st.sampled_from(
        [torch.bfloat16, torch.bool, torch.device("cpu"), torch.device("cuda"), torch.Size([2, 0])]
    )
    | st.floats(width=32).map(np.float32)
    | st.lists(st.integers(-9, 9), max_size=5).map(torch.tensor)
    | st.lists(st.integers(-9, 9), max_size=5).map(np.array)
)
STATES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers()).map(Counter)
    ),
)


@given(STATES)
def test_every_state_comes_back_the_same(state: Any) -> None:
    assert_same(there_and_back(state), state)


@given(STATES)
def test_equal_states_have_equal_skeletons(state: Any) -> None:
    assert tree.flatten(there_and_back(state)).skeleton == tree.flatten(state).skeleton


def test_a_defaultdict_comes_back_as_a_dict() -> None:
    state = defaultdict(list, {"a": [1]})
    assert_same(there_and_back(state), {"a": [1]})


def test_a_modules_state_keeps_the_versions_of_its_layers() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    back = there_and_back(state)
    assert_same(back, state)
    assert back._metadata == state._metadata  # type: ignore[attr-defined]
    assert back._metadata["1"] == {"version": 2}


@pytest.mark.filterwarnings("ignore:.*support is experimental")
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("name", sorted(dtypes.BY_NAME))
def test_tensors_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    dtype = dtypes.BY_NAME[name]
    size = TensorSpec(dtype, shape).size_bytes
    bits = torch.arange(1, size + 1, dtype=torch.uint8)
    tensor = (bits % 2 if dtype is torch.bool else bits).view(dtype).reshape(shape)
    assert_same(there_and_back([tensor, tensor]), [tensor, tensor])


def test_the_known_dtypes_are_all_that_are_not_quantized() -> None:
    assert {torch.bool, torch.bfloat16, torch.complex64, torch.uint64} <= set(dtypes.NAMES)
    assert not {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2} & set(dtypes.NAMES)


BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
DENSE = {
    "contiguous": BASE,
    "channels last": BASE.to(memory_format=torch.channels_last),
    "one channel, channels last": BASE[:, :1].contiguous(memory_format=torch.channels_last),
    "transposed": BASE[0, 0].T,
    "permuted": BASE.permute(3, 1, 0, 2),
    "the first rows": BASE[:1],
    "at an offset": BASE[1, 2],
    "size 1 amid": BASE[0].permute(2, 0, 1).unsqueeze(1),
}
SPARSE_OR_OVERLAPPING = {
    "with gaps": BASE[..., ::2],
    "a column": BASE[0, 0, :, 1],
    "expanded": BASE[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "overlapping": BASE.as_strided((4, 4), (1, 1)),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_tensors_are_not_copied_and_keep_their_order_in_memory(name: str) -> None:
    tensor = DENSE[name]
    (taken,) = tree.flatten(tensor).tensors
    assert taken.is_contiguous() and taken.data_ptr() == tensor.data_ptr()
    back = there_and_back(tensor)
    assert_same(back, tensor)
    significant = [d for d in range(tensor.dim()) if tensor.shape[d] != 1]
    assert [back.stride(d) for d in significant] == [tensor.stride(d) for d in significant]
    assert tree.flatten(back).skeleton == tree.flatten(tensor).skeleton


@pytest.mark.parametrize("name", SPARSE_OR_OVERLAPPING)
def test_other_tensors_come_back_contiguous(name: str) -> None:
    tensor = SPARSE_OR_OVERLAPPING[name]
    back = there_and_back(tensor)
    assert back.is_contiguous()
    assert torch.equal(back, tensor)


def test_a_parameter_comes_back_as_a_tensor_without_gradient() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    back = there_and_back({"p": parameter})["p"]
    assert type(back) is torch.Tensor and not back.requires_grad
    assert torch.equal(back, parameter)


READ_ONLY = np.arange(3)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "value",
    [
        np.array(3.5),
        np.zeros((2, 0, 3), ">i4"),
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.array(["2020-01-01", "NaT"], "datetime64[ms]"),
        np.array([1.5], np.longdouble),
        READ_ONLY,
        np.random.RandomState(3).get_state(),
        np.float16(2.5),
        np.float64("nan"),
        np.bool_(True),
        np.uint64(2**64 - 1),
        np.datetime64("2020-01-01", "s"),
    ],
    ids=lambda value: getattr(value, "dtype", type(value)),
)
def test_numpy_values(value: Any) -> None:
    assert_same(there_and_back(value), value)


# What cannot be saved.


class Colour(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"scheduler": {"lr_lambdas": [lambda epoch: 1.0]}},
            'state["scheduler"]["lr_lambdas"][0] is a function: '
            "ringps can only save plain values and tensors",
        ),
        ({3: (1, {2})}, "state[3][1] is a set: ringps can only save plain values and tensors"),
        (object(), "state is an object: ringps can only save plain values and tensors"),
        ({"c": Colour.RED}, 'state["c"] is a Colour: '),
        ([Point(1, 2)], "state[0] is a Point: "),
        ([1j], "state[0] is a complex: "),
        ([np.array([object()])], "state[0] is a numpy ndarray of dtype object: only numbers can be saved"),
        ([np.array(["text"])], "state[0] is a numpy ndarray of dtype <U4: "),
        ([np.str_("text")], "state[0] is a numpy str_ of dtype <U4: "),
        ([torch.qint8], "state[0] is torch.qint8: "),
        ([torch.eye(2).to_sparse()], "state[0] is a sparse_coo tensor: ringps can only save dense ones"),
        (
            {"w": torch.empty(2, device="meta")},
            'state["w"] is a tensor on meta: ringps can only save tensors in the CPU\'s memory; '
            "copy it there with .cpu() first",
        ),
        ([torch.ones(2).as_subclass(Special)], "state[0] is a Special: "),
        ({"d": {(1, 2): 3}}, 'state["d"] has the key (1, 2): ringps can only save text and whole numbers'),
        ({"d": {True: 3}}, 'state["d"] has the key True: '),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_named(state: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        tree.flatten(state)
    assert str(caught.value).startswith(message)


def test_what_contains_itself_is_an_error() -> None:
    state: dict[str, Any] = {}
    state["again"] = [state]
    with pytest.raises(ValueError, match=r'^state\["again"\]\[0\].* is nested more than 32 deep'):
        tree.flatten(state)


def test_the_greatest_depth() -> None:
    state: Any = 1
    for _ in range(tree.MAX_DEPTH):
        state = [state]
    assert there_and_back(state) == state
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        tree.flatten([state])


def test_a_long_skeleton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_SKELETON_BYTES", 100)
    assert there_and_back([0] * 90) == [0] * 90
    with pytest.raises(
        ValueError, match=r"model has 10[0-9] bytes beside its tensors, more than 100: keep long"
    ):
        tree.flatten([0] * 100, name="model")


# Optimizers and their companions.


def factories(module: Any, base: type) -> list[str]:
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return sorted({kind.__name__ for kind in found if kind is not base})


class Training:
    """A small model in training with a given optimizer."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(5)
        self.sparse = name == "SparseAdam"
        shapes = [(4, 3)] if self.sparse else [(4, 3), (3, 3)]
        self.parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        groups = [{"params": [p], "lr": 0.01 * n} for n, p in enumerate(self.parameters, 1)]
        lone = name == "LBFGS"  # takes one group only
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(
            self.parameters if lone else groups, lr=0.05
        )

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = sum((p**2).sum() + p.sin().sum() for p in self.parameters)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        for p in self.parameters if self.sparse else ():
            assert p.grad is not None
            p.grad = p.grad.to_sparse(1)
        return loss

    def step(self) -> None:
        self.optimizer.step(self.loss)

    def take_over(self, other: Training) -> None:
        """Its parameters, and its optimizer's state as bytes and tensors."""
        self.optimizer.load_state_dict(there_and_back(other.optimizer.state_dict()))
        with torch.no_grad():
            for mine, theirs in zip(self.parameters, other.parameters, strict=True):
                mine.copy_(theirs)


@pytest.mark.parametrize("name", factories(torch.optim, torch.optim.Optimizer))
def test_every_optimizer_goes_on_with_the_same_bits(name: str) -> None:
    one, other = Training(name), Training(name)
    for _ in range(3):
        one.step()
    state = one.optimizer.state_dict()
    assert_same(there_and_back(state), state)
    other.take_over(one)
    for _ in range(2):
        one.step()
        other.step()
    assert_same(other.parameters, one.parameters)
    assert_same(other.optimizer.state_dict(), one.optimizer.state_dict())


class Scale:
    """A callable with state, which schedulers put into theirs."""

    def __init__(self) -> None:
        self.base = 0.9

    def __call__(self, epoch: float) -> float:
        return self.base**epoch


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda epoch: 0.9**epoch, Scale()]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.LambdaLR(o, lambda epoch: 0.9**epoch)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 0.2, scale_fn=Scale()),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, 10),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


def test_every_scheduler_is_here() -> None:
    there = {*factories(schedulers, schedulers.LRScheduler), "SWALR"} - {"_LRScheduler"}
    assert set(SCHEDULERS) == there


@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in", "ignore:.*save or load the state of the optimizer"
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_with_the_same_bits(name: str) -> None:
    one, other = Training("SGD"), Training("SGD")
    following, taking_over = SCHEDULERS[name](one.optimizer), SCHEDULERS[name](other.optimizer)
    advance = functools.partial(turn, measure=name == "ReduceLROnPlateau")
    for _ in range(3):
        advance(one, following)
    state = following.state_dict()
    assert_same(there_and_back(state), state)
    other.take_over(one)
    taking_over.load_state_dict(there_and_back(state))
    for _ in range(3):
        advance(one, following)
        advance(other, taking_over)
        rates = [[group["lr"] for group in t.optimizer.param_groups] for t in (one, other)]
        assert_same(*rates)
    assert_same(taking_over.state_dict(), following.state_dict())


def turn(training: Training, scheduler: Any, *, measure: bool) -> None:
    training.step()
    scheduler.step(*([1.0] if measure else []))


def test_a_gradient_scaler_goes_on_with_the_same_bits() -> None:
    one, other = (torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2) for _ in range(2))
    training = Training("SGD")
    for _ in range(3):
        training.optimizer.zero_grad()
        one.scale(sum((p**2).sum() for p in training.parameters)).backward()  # type: ignore[union-attr]
        one.step(training.optimizer)
        one.update()
    state = one.state_dict()
    assert state["scale"] != 2.0**9
    assert_same(there_and_back(state), state)
    other.load_state_dict(there_and_back(state))
    other.scale(torch.ones(1))
    assert_same(other.state_dict(), state)


# Bytes from strangers.


def node(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


U8 = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("skeleton", "tensors"),
    [
        (b"", []),
        (b"\xc1", []),
        (node([0]) + b"\x00", []),
        (node({}), []),
        (node([]), []),
        (node([True]), []),
        (node([99, 1]), []),
        (node([-1, 1]), []),
        (node(["list"]), []),
        (node(msgpack.ExtType(5, b"x")), []),
        (node(msgpack.Timestamp(5)), []),
        (b"\x91" * 2000 + b"\x00", []),
        (b"\x92\x00" * 40 + b"\x00", []),
        (node([2, "a"]), []),
        (node([2, 1.5, 2]), []),
        (node([2, [0], 2]), []),
        (node([2, "a", 1, "a", 2]), []),
        (node([4]), []),
        (node([4, [2], "a"]), []),
        (node([6, None]), []),
        (node(1), [U8]),
        (node([6]), [U8]),
        (node([6, None, 1]), [U8]),
        (node([6, [1]]), [U8]),
        (node([6, [0, 0]]), [U8.view(2, 4)]),
        (node([6, [0, True]]), [U8.view(2, 4)]),
        (node([6, "ab"]), [U8.view(2, 4)]),
        (node([7, "<f8", [2]]), [U8]),
        (node([7, "<f8", [1.0]]), [U8]),
        (node([7, "<f8", [-1]]), [U8]),
        (node([7, "<f8", []]), [U8.view(2, 4)]),
        (node([7, "<f8", []]), [U8.view(torch.float64)]),
        (node([7, "|O8", [1]]), [U8]),
        (node([7, "<f7", [1]]), [U8]),
        (node([7, "<M8[q]", [1]]), [U8]),
        (node([7, "<f8", [1] * 100]), [U8]),
        (node([7, "<f8", [2**62, 2**62, 0]]), [U8[:0]]),
        (node([7, "<f8", [2**63]]), [U8]),
        (node([8, "<f8", b"1234567"]), []),
        (node([8, "<f8", "12345678"]), []),
        (node([8, 8, b"12345678"]), []),
        (node([9, "int"]), []),
        (node([9, "qint8"]), []),
        (node([9, [0]]), []),
        (node([10, -1]), []),
        (node([10, 2**63]), []),
        (node([11, "warp:9"]), []),
        (node([11, 5]), []),
        (node([11, "c" * 100]), []),
        (node([12, "5"]), []),
        (node([12]), []),
    ],
    ids=str,
)
def test_a_malformed_skeleton_is_a_frame_error(skeleton: bytes, tensors: list[torch.Tensor]) -> None:
    with pytest.raises(FrameError):
        tree.unflatten(skeleton, tensors)


def test_a_skeleton_that_is_too_long_is_a_frame_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_SKELETON_BYTES", 3)
    assert tree.unflatten(node([0, 1]), []) == [1]
    with pytest.raises(FrameError, match="too long"):
        tree.unflatten(node([0, 1, 2]), [])


SAMPLE = tree.flatten(
    {
        "model": torch.nn.BatchNorm1d(2).state_dict(),
        "plain": [None, True, 2**70, 1.5, "text", b"bytes", (1, 2), Counter([3]), OrderedDict(a=1)],
        "others": [torch.float32, torch.Size([1]), torch.device("cpu"), np.float32(2), np.arange(3), BASE.mT],
    }
)


@given(st.binary() | st.builds(node, st.recursive(st.none() | st.integers(0, 13), st.lists)))
def test_any_bytes_are_a_state_or_a_frame_error(skeleton: bytes) -> None:
    check_only_frame_errors(skeleton)


@given(st.integers(0, len(SAMPLE.skeleton) - 1), st.integers(0, 255))
def test_an_altered_byte_makes_another_state_or_a_frame_error(at: int, byte: int) -> None:
    altered = bytearray(SAMPLE.skeleton)
    altered[at] = byte
    check_only_frame_errors(bytes(altered))


def check_only_frame_errors(skeleton: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            tree.unflatten(skeleton, SAMPLE.tensors)
        except FrameError:
            pass


# Pieces.

SPECS = st.builds(
    TensorSpec,
    st.sampled_from([torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64]),
    st.lists(st.integers(0, 40), max_size=2).map(tuple),
)


@given(st.lists(SPECS, max_size=12), st.sampled_from([1, 7, 64, 100, 4096]))
def test_pieces_are_the_long_string_cut_evenly(specs: list[TensorSpec], piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        layout = Layout(specs)
        assert layout == Layout.decode(layout.encode())
        source, target = Pieces.allocate(layout), Pieces.allocate(layout)
        whole = b""
        for number, tensor in enumerate(source.tensors):
            tensor.reshape(-1).view(torch.uint8).fill_(number % 2)
            assert tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0
            whole += bytes(-len(whole) % ALIGNMENT) + raw(tensor)
        assert layout.total_bytes == len(whole)
        cut = [b"".join(map(bytes, source.views(piece))) for piece in range(layout.piece_count)]
        assert cut == [whole[at : at + piece_bytes] for at in range(0, len(whole), piece_bytes)]
        assert [layout.size_of(piece) for piece in range(layout.piece_count)] == list(map(len, cut))
        for piece, part in enumerate(cut):
            assert source.digest(piece) == pieces.digest([memoryview(part)])
            target.copy_from(source, piece)
        assert_same(target.tensors, source.tensors)


def test_pieces_of_tensors_that_flatten_did_not_give() -> None:
    with pytest.raises(ValueError, match=r"tensor 1 \(torch.float32, \(4, 5\), on cpu\) is not a contiguous"):
        Pieces([torch.ones(2), torch.ones(5, 4).T])


@pytest.mark.parametrize(
    "layout",
    [
        b"",
        node(1),
        node([1]),
        node([[]]),
        node([["float32", -1]]),
        node([["float32", True]]),
        node([["qint8", 1]]),
        node([["float32", *[1] * 65]]),
        node([["float32", 2**44, 2]]),
        node([["float32", 2**30, 2**30, 0]]),
        node([["float32", 2**43], ["float32", 2**43 + 1]]),
        node([["float32", 1]]) + b"\0",
    ],
    ids=str,
)
def test_a_malformed_layout_is_a_frame_error(layout: bytes) -> None:
    with pytest.raises(FrameError):
        Layout.decode(layout)


@given(st.binary())
def test_any_bytes_are_a_layout_or_a_frame_error(layout: bytes) -> None:
    try:
        Layout.decode(layout)
    except FrameError:
        pass
