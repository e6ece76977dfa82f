"""A nested state, such as `state_dict()` gives, as plain bytes and a list of tensors, and back.

The bytes (the *skeleton*) are msgpack: None, bools, whole numbers, floats, text and bytes as they are, and
everything else as a list `[kind, ...]`. Tensors are not in it; the skeleton says where each belongs, in the
order of the list.

What comes back has the same types and the same bits, with these exceptions: a parameter comes back as a
tensor, a `defaultdict` as a dict, a tensor whose elements overlap or leave gaps in memory comes back
contiguous (others, such as channels-last ones, keep their order in memory), a numpy array in C order, and
what was the same object in two places is two. Tensors come back in the CPU's memory, whatever device they
were on, and a device without its number: which GPU it is differs from worker to worker.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch

from ringps.checkpoint import dtypes
from ringps.errors import FrameError

MAX_SKELETON_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 32
"""How deep dicts, lists and tuples may be nested."""

_LIST, _TUPLE, _DICT, _ORDERED, _MODULE, _COUNTER = range(6)
_TENSOR, _ARRAY, _SCALAR, _DTYPE, _SIZE, _DEVICE, _WHOLE = range(6, 13)

_ARRAY_DTYPE = re.compile(r"[<>|][biufcmM]\d{1,2}(\[\d{0,9}[A-Za-z]{1,3}\])?")
_PLAIN = (type(None), bool, float, bytes, str)


class State(NamedTuple):
    """A nested state, taken apart."""

    skeleton: bytes
    """Everything but the tensors."""

    tensors: list[torch.Tensor]
    """Contiguous, in the CPU's memory unless other devices were allowed, without gradient. They share memory
    with those of the state wherever that has them without overlaps and gaps: they are to be read, and change
    when the state changes."""


def flatten(state: Any, name: str = "state", *, devices: bool = False) -> State:
    """Take a nested state apart, without copying its tensors where they are dense.

    Args:
        state: dicts (also `OrderedDict`, `Counter`, `defaultdict`) with text or whole numbers as keys, lists,
            tuples, None, bools, whole numbers of any size, floats, text, bytes, tensors and numpy arrays in
            the CPU's memory, numpy scalars, `torch.dtype`, `torch.Size`, `torch.device`.
        name: what to call it in errors.
        devices: tensors may lie in the memory of other devices too, where they are left.

    Returns:
        The skeleton, equal for equal states whose dicts have the same order, and the tensors.

    Raises:
        TypeError: something else is in it; the message says where.
        ValueError: it is nested deeper than `MAX_DEPTH`, or its skeleton is longer than
            `MAX_SKELETON_BYTES`.
    """
    tensors: list[torch.Tensor] = []
    try:
        tree = _Writer(tensors, devices).write(state, 0)
    except _Unsuitable as problem:
        path = "".join(f"[{json.dumps(key)}]" for key in reversed(problem.keys))
        raise problem.error(f"{name}{path} {problem.what}") from None
    skeleton: bytes = msgpack.packb(tree, unicode_errors="surrogatepass")
    if len(skeleton) > MAX_SKELETON_BYTES:
        raise ValueError(
            f"{name} has {len(skeleton)} bytes beside its tensors, more than {MAX_SKELETON_BYTES}: "
            "keep long lists of numbers in tensors"
        )
    return State(skeleton, tensors)


def unflatten(skeleton: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """Put together what `flatten` took apart.

    Args:
        skeleton: may come from a stranger.
        tensors: of the dtypes and shapes that `flatten` gave. The result shares their memory.

    Raises:
        FrameError: the skeleton is none, or belongs to other tensors.
    """
    if len(skeleton) > MAX_SKELETON_BYTES:
        raise FrameError("state: skeleton too long")
    try:
        tree = msgpack.unpackb(skeleton, unicode_errors="surrogatepass", strict_map_key=True)
    except (ValueError, RecursionError):  # every error of msgpack's own is a ValueError
        raise FrameError("state: skeleton that is not msgpack") from None
    reader = _Reader(tensors)
    state = reader.read(tree, 0)
    if reader.used != len(tensors):
        raise FrameError("state: tensors that belong nowhere")
    return state


class _Unsuitable(Exception):
    """Something cannot be saved. Every container that it is in adds its key on the way out."""

    def __init__(self, what: str, error: type[Exception] = TypeError) -> None:
        super().__init__(what)
        self.what = what
        self.error = error
        self.keys: list[str | int] = []


def _is_a(value: object, what: str = "plain values and tensors") -> _Unsuitable:
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    return _Unsuitable(f"is {article} {kind}: ringps can only save {what}")


class _Writer:
    """From values to what msgpack can hold; collects the tensors."""

    def __init__(self, tensors: list[torch.Tensor], devices: bool) -> None:
        self._tensors = tensors
        self._devices = devices

    def write(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            if -(2**63) <= value < 2**64:
                return value
            return [_WHOLE, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]
        if isinstance(value, np.generic):
            return [_SCALAR, _array_dtype(value), value.tobytes()]
        handle = _WRITERS.get(kind)
        if handle is None:
            raise _is_a(value)
        if depth == MAX_DEPTH and handle in _NESTED:
            raise _Unsuitable(f"is nested more than {MAX_DEPTH} deep, or contains itself", ValueError)
        return handle(self, value, depth)

    def write_item(self, key: str | int, value: Any, depth: int) -> Any:
        try:
            return self.write(value, depth)
        except _Unsuitable as problem:
            problem.keys.append(key)
            raise

    def write_sequence(self, value: Sequence[Any], depth: int) -> list[Any]:
        written: list[Any] = [_LIST if type(value) is list else _TUPLE]
        for position, item in enumerate(value):
            written.append(item if type(item) in _PLAIN else self.write_item(position, item, depth + 1))
        return written

    def write_mapping(self, value: Mapping[Any, Any], depth: int) -> list[Any]:
        written: list[Any] = [_DICT_KINDS[type(value)]]
        metadata = getattr(value, "_metadata", None)
        if written[0] == _ORDERED and metadata is not None:
            # A module's state_dict() carries the versions of its layers' formats there.
            written = [_MODULE, self.write(metadata, depth + 1)]
        for key, item in value.items():
            if type(key) is str:
                written.append(key)
            elif type(key) is int:
                written.append(self.write(key, depth))
            else:
                raise _Unsuitable(f"has the key {key!r}: ringps can only save text and whole numbers as keys")
            written.append(item if type(item) in _PLAIN else self.write_item(key, item, depth + 1))
        return written

    def write_tensor(self, value: torch.Tensor, depth: int) -> list[Any]:
        if value.is_quantized or value.dtype not in dtypes.NAMES:
            raise _Unsuitable("is a quantized tensor: ringps can only save plain values and tensors")
        if value.layout is not torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise _Unsuitable(f"is a {layout} tensor: ringps can only save dense ones")
        if value.device.type != "cpu" and (value.device.type == "meta" or not self._devices):
            raise _Unsuitable(
                f"is a tensor on {value.device}: ringps can only save tensors in the CPU's memory; "
                "copy it there with .cpu() first"
            )
        value = value.detach()
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        order: list[int] | None = None
        if not value.is_contiguous():
            order = _order_in_memory(value)
            turned = value.permute(order)
            if turned.is_contiguous():
                value = turned
            else:
                order, value = None, value.contiguous()
        self._tensors.append(value)
        return [_TENSOR, order]

    def write_array(self, value: np.ndarray[Any, Any], depth: int) -> list[Any]:
        dtype = _array_dtype(value)
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        # torch has no tensors that cannot be written to.
        self._tensors.append(torch.from_numpy(raw if raw.flags.writeable else raw.copy()))
        return [_ARRAY, dtype, list(value.shape)]

    def write_dtype(self, value: torch.dtype, depth: int) -> list[Any]:
        if value not in dtypes.NAMES:
            raise _Unsuitable(f"is {value}: ringps can only save dtypes of plain tensors")
        return [_DTYPE, dtypes.NAMES[value]]

    def write_size(self, value: torch.Size, depth: int) -> list[Any]:
        return [_SIZE, *value]

    def write_device(self, value: torch.device, depth: int) -> list[Any]:
        return [_DEVICE, value.type]


def _order_in_memory(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the one with the longest stride to that with the shortest.

    Those of size 1 come first: their strides mean nothing, and must not make two ranks' skeletons differ."""
    size, stride = tensor.shape, tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (size[d] != 1, -stride[d] if size[d] != 1 else 0, d))


def _array_dtype(value: Any) -> str:
    dtype: str = value.dtype.str
    if not _ARRAY_DTYPE.fullmatch(dtype):
        raise _Unsuitable(
            f"is a numpy {type(value).__name__} of dtype {value.dtype}: only numbers can be saved"
        )
    return dtype


_DICT_KINDS = {dict: _DICT, defaultdict: _DICT, OrderedDict: _ORDERED, Counter: _COUNTER}
_NESTED = (_Writer.write_sequence, _Writer.write_mapping)
_WRITERS: dict[type, Callable[[_Writer, Any, int], list[Any]]] = {
    list: _Writer.write_sequence,
    tuple: _Writer.write_sequence,
    **dict.fromkeys(_DICT_KINDS, _Writer.write_mapping),
    torch.Tensor: _Writer.write_tensor,
    torch.nn.Parameter: _Writer.write_tensor,
    np.ndarray: _Writer.write_array,
    torch.dtype: _Writer.write_dtype,
    torch.Size: _Writer.write_size,
    torch.device: _Writer.write_device,
}


class _Reader:
    """From what msgpack gave to values; every part is checked."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self.used = 0

    def read(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind in _PLAIN or kind is int:
            return node
        if kind is not list or not node or type(node[0]) is not int or not 0 <= node[0] < len(_READERS):
            raise FrameError("state: not a node")
        if depth > MAX_DEPTH:
            raise FrameError("state: nested too deep")
        return _READERS[node[0]](self, node, depth)

    def _next_tensor(self) -> torch.Tensor:
        if self.used == len(self._tensors):
            raise FrameError("state: more tensors than there are")
        self.used += 1
        return self._tensors[self.used - 1]

    def read_list(self, node: list[Any], depth: int) -> Any:
        return [self.read(item, depth + 1) for item in node[1:]]

    def read_tuple(self, node: list[Any], depth: int) -> Any:
        return tuple(self.read_list(node, depth))

    def read_dict(self, node: list[Any], depth: int) -> Any:
        return self._fill({}, node[1:], depth)

    def read_ordered(self, node: list[Any], depth: int) -> Any:
        return self._fill(OrderedDict(), node[1:], depth)

    def read_module(self, node: list[Any], depth: int) -> Any:
        if len(node) < 2:
            raise FrameError("state: module without metadata")
        metadata = self.read(node[1], depth + 1)
        state = self._fill(OrderedDict(), node[2:], depth)
        state._metadata = metadata
        return state

    def read_counter(self, node: list[Any], depth: int) -> Any:
        return self._fill(Counter(), node[1:], depth)

    def _fill(self, into: Any, items: list[Any], depth: int) -> Any:
        if len(items) % 2:
            raise FrameError("state: key without a value")
        for at in range(0, len(items), 2):
            key = self.read(items[at], depth)
            if type(key) is not str and type(key) is not int:
                raise FrameError("state: not a key")
            if key in into:
                raise FrameError("state: the same key twice")
            into[key] = self.read(items[at + 1], depth + 1)
        return into

    def read_tensor(self, node: list[Any], depth: int) -> Any:
        (order,) = self._parts(node, 1)
        tensor = self._next_tensor()
        if order is None:
            return tensor
        if not _wholes(order) or sorted(order) != list(range(tensor.dim())):
            raise FrameError("state: not an order of dimensions")
        return tensor.permute([order.index(dimension) for dimension in range(len(order))])

    def read_array(self, node: list[Any], depth: int) -> Any:
        name, shape = self._parts(node, 2)
        dtype, tensor = _numpy_dtype(name), self._next_tensor()
        if tensor.dtype is not torch.uint8 or tensor.dim() != 1 or not _wholes(shape):
            raise FrameError("state: not an array")
        if prod(shape) * dtype.itemsize != tensor.numel():
            raise FrameError("state: array of another size")
        try:
            return tensor.numpy().view(dtype).reshape(shape)
        except (ValueError, OverflowError):  # more dimensions, or longer ones, than numpy has
            raise FrameError("state: array of no possible shape") from None

    def read_scalar(self, node: list[Any], depth: int) -> Any:
        name, raw = self._parts(node, 2)
        dtype = _numpy_dtype(name)
        if type(raw) is not bytes or len(raw) != dtype.itemsize:
            raise FrameError("state: scalar of another size")
        return np.frombuffer(raw, dtype)[0]

    def read_dtype(self, node: list[Any], depth: int) -> Any:
        (name,) = self._parts(node, 1)
        if type(name) is not str or name not in dtypes.BY_NAME:
            raise FrameError("state: dtype unknown here")
        return dtypes.BY_NAME[name]

    def read_size(self, node: list[Any], depth: int) -> Any:
        if not _wholes(node[1:]):
            raise FrameError("state: not a size")
        return torch.Size(node[1:])

    def read_device(self, node: list[Any], depth: int) -> Any:
        (name,) = self._parts(node, 1)
        if type(name) is not str or len(name) > 64:
            raise FrameError("state: not a device")
        try:
            return torch.device(name)
        except RuntimeError:
            raise FrameError("state: device unknown here") from None

    def read_whole(self, node: list[Any], depth: int) -> Any:
        (raw,) = self._parts(node, 1)
        if type(raw) is not bytes:
            raise FrameError("state: not a whole number")
        return int.from_bytes(raw, "little", signed=True)

    def _parts(self, node: list[Any], count: int) -> list[Any]:
        if len(node) != 1 + count:
            raise FrameError("state: wrong number of parts")
        return node[1:]


def _wholes(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _numpy_dtype(name: Any) -> np.dtype[Any]:
    if type(name) is not str or not _ARRAY_DTYPE.fullmatch(name):
        raise FrameError("state: not a numpy dtype")
    try:
        return np.dtype(name)
    except (TypeError, ValueError):
        raise FrameError("state: numpy dtype unknown here") from None


_READERS: tuple[Callable[[_Reader, Any, int], Any], ...] = (
    _Reader.read_list,
    _Reader.read_tuple,
    _Reader.read_dict,
    _Reader.read_ordered,
    _Reader.read_module,
    _Reader.read_counter,
    _Reader.read_tensor,
    _Reader.read_array,
    _Reader.read_scalar,
    _Reader.read_dtype,
    _Reader.read_size,
    _Reader.read_device,
    _Reader.read_whole,
)
