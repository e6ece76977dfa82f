"""Files of tensors that every tool reads (https://github.com/huggingface/safetensors).

Eight bytes with the length of the header, the header (JSON: dtype, shape and place of each tensor, by name),
and the tensors, one right behind the other. Written here and not by the package of that name because a file
goes out of a snapshot in blocks that are hashed on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch

from ringps.checkpoint.pieces import ALIGNMENT
from ringps.errors import FrameError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The package of that name reads no longer ones."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class Named(NamedTuple):
    """A tensor that is to be in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def suits(name: Any, value: Any) -> bool:
    """Whether a file can hold this value, under this name."""
    return (
        type(name) is str
        and name != _METADATA
        and name.isprintable()  # no lone surrogates, which are no text to other languages
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and not value.is_meta
        and value.dtype in NAMES
    )


def order(tensors: Iterable[Named]) -> list[Named]:
    """In which order they lie in a file: falling size of their elements, so that none lies across."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def header(tensors: Iterable[Named]) -> bytes:
    """What goes before the bytes of these tensors, which are in the right `order`.

    Raises:
        ValueError: it would be longer than readers accept.
    """
    quoted = json.JSONEncoder(ensure_ascii=False).encode
    # Put together by hand: for thousands of tensors, dicts and lists would take several times as long.
    entries = [f'"{_METADATA}":{{"format":"pt"}}']
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries.append(
            f'{quoted(name)}:{{"dtype":"{NAMES[dtype]}","shape":{list(shape)},"data_offsets":[{begin},{end}]}}'
        )
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the names and shapes of the weights take {len(text)} bytes, and {MAX_HEADER_BYTES} fit"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def parse(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in a file, by name, in the order of their places.

    Args:
        raw: the file's bytes: uint8, of one dimension, in the CPU's memory; may come from a stranger. The
            result shares their memory but for tensors that lie across the size of their elements.

    Raises:
        FrameError: this is not such a file, or not a whole one.
    """
    assert raw.dtype is torch.uint8 and raw.dim() == 1 and raw.device.type == "cpu" and raw.is_contiguous()
    size_bytes = int.from_bytes(raw[:_LENGTH_BYTES].numpy().tobytes(), "little")
    body = _LENGTH_BYTES + size_bytes
    if raw.numel() < _LENGTH_BYTES or size_bytes > MAX_HEADER_BYTES or body > raw.numel():
        raise FrameError("safetensors: shorter than its header")
    try:
        entries = json.loads(raw[_LENGTH_BYTES:body].numpy().tobytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise FrameError("safetensors: header that is not JSON") from None
    if type(entries) is not dict:
        raise FrameError("safetensors: header that is not a JSON object")
    entries.pop(_METADATA, None)
    places = sorted(_place(name, entry) for name, entry in entries.items())
    found, end = {}, 0
    for begin, stop, name, dtype, shape in places:
        if begin != end:
            raise FrameError(
                f"safetensors: {json.dumps(name)} does not begin where the tensor before it ends"
            )
        end = stop
        if body + end > raw.numel():
            raise FrameError(f"safetensors: ends before {json.dumps(name)} does")
        found[name] = _view(raw[body + begin : body + end], DTYPES[dtype], shape)
    if body + end != raw.numel():
        raise FrameError(f"safetensors: has {raw.numel() - body - end} bytes that belong to no tensor")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same name twice")
    return found


def _place(name: str, entry: Any) -> tuple[int, int, str, str, list[int]]:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FrameError(f"safetensors: {json.dumps(name)} is not a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise FrameError(f"safetensors: {json.dumps(name)} is of a dtype unknown here")
    if not _wholes(shape) or not _wholes(offsets) or len(offsets) != 2:
        raise FrameError(f"safetensors: {json.dumps(name)} has no shape and no place")
    begin, end = offsets
    # Torch multiplies the dimensions of an empty tensor too, leaving out the zeros.
    if end - begin != prod(shape) * DTYPES[dtype].itemsize or prod(filter(None, shape)) >= 2**56:
        raise FrameError(f"safetensors: {json.dumps(name)} has a place that is not as long as its shape says")
    return begin, end, name, dtype, shape


def _wholes(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _view(raw: torch.Tensor, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)
