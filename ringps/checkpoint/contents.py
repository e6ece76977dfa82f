"""What is in which file of a checkpoint: from a training state to the files of each rank, and back.

The model's tensors lie in files that every tool reads (`safetensors`). Everything else, with the order of
the model's names, is one packed string (`packed`), cut in slices. What is a rank's alone is another packed
string.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ringps.checkpoint import safetensors
from ringps.checkpoint.division import INDEX, Part, divide, numbered
from ringps.checkpoint.packed import Packed, as_tensor, unpack
from ringps.checkpoint.tree import flatten
from ringps.errors import CheckpointError, FrameError
from ringps.kernels.digest import combine, digest

COMPRESSED_SUFFIX = ".zst"
"""Ends the name of a file that is stored compressed."""

_MODEL = "model"
_PART = re.compile(r"(model)(?:-\d{5,9}-of-\d{5,9})?\.safetensors|(state)(?:-\d{5,9}-of-\d{5,9})?\.bin")
_OF = re.compile(r"-of-(\d+)")
_RANK = re.compile(r"rank-(\d{5,9})-of-(\d{5,9})\.bin")


class Source(NamedTuple):
    """A file that a rank is to write, as it lies in memory."""

    name: str
    kind: str
    """"weights", "index", "state" or "rank"."""
    tensors: list[torch.Tensor]
    """Contiguous, of any dtypes and on any devices; most share memory with the state. Their bytes, one
    behind the other, are the file's."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Composed(NamedTuple):
    """What a rank is to write."""

    sources: list[Source]
    fingerprint: bytes
    """16 bytes that are equal on ranks whose states have the same names, shapes and plain values; what is in
    tensors is not looked at. Files of ranks that differ do not belong together."""


class Contents(NamedTuple):
    """What files held."""

    state: dict[str, Any]
    """As it was handed to `compose`, but for the model, which is an `OrderedDict`, and whose tensors are
    contiguous. Tensors share memory with the files' bytes."""
    ranks: dict[int, Any]
    """What was each rank's own, by rank, of those whose files were given."""


def compose(state: dict[str, Any], own: Any, rank: int, world_size: int) -> Composed:
    """The files that this rank is to write. Other ranks' calls with an equal state give the others.

    Args:
        state: of text keys, what `tree.flatten` takes, on any device. `state["model"]` is a dict by name.
        own: what is this rank's alone; what `tree.flatten` takes.
        rank: this rank.
        world_size: number of ranks.

    Returns:
        The files, with nothing copied but tensors that are not dense, or as weights not contiguous, and a
        little text. They are to be read, and change when the state changes.

    Raises:
        TypeError: something is in the state that cannot be saved; the message says where.
        ValueError: there is too much beside the tensors.
    """
    model = state[_MODEL]
    weights = {name: value for name, value in model.items() if safetensors.suits(name, value)}
    others = {name: value for name, value in model.items() if name not in weights}
    rest = {**state, _MODEL: {"names": list(model), "others": others}}
    packed = Packed(flatten(rest, devices=True))
    tensors = list(weights.values())
    parts = divide([tensor.nbytes for tensor in tensors], packed.total_bytes, world_size)
    sources = []
    for part in parts:
        if part.rank != rank:
            continue
        if part.kind == "state":
            found = packed.sources(part.start, part.stop)
        elif part.kind == "weights":
            found = _file_of(weights, part)
        else:
            found = [as_tensor(_index(weights, parts))]
        sources.append(Source(part.name, part.kind, found))
    alone = Packed(flatten(own, "own", devices=True))
    sources.append(Source(rank_file(rank, world_size), "rank", alone.sources(0, alone.total_bytes)))
    return Composed(sources, combine([digest(packed.head), repr(parts).encode()]))


def rank_file(rank: int, world_size: int) -> str:
    """The name of the file with what is a rank's alone."""
    return f"rank-{rank:05d}-of-{world_size:05d}.bin"


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous()


def _file_of(weights: Mapping[str, torch.Tensor], part: Part) -> list[torch.Tensor]:
    items = list(weights.items())
    inside = [items[number] for number in part.weights]
    named = safetensors.order(
        safetensors.Named(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in inside
    )
    return [as_tensor(safetensors.header(named)), *(_resolved(weights[entry.name]) for entry in named)]


def _index(weights: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> bytes:
    """Which weight lies in which file, as Hugging Face's libraries want it."""
    names = list(weights)
    total = sum(tensor.nbytes for tensor in weights.values())
    where = {names[number]: part.name for part in parts for number in part.weights}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return json.dumps(index, ensure_ascii=False, indent=2).encode() + b"\n"


def assemble(files: Mapping[str, torch.Tensor]) -> Contents:
    """Put together what the ranks have written.

    Args:
        files: the bytes of all files of a checkpoint by name, but for any ranks' own: uint8, of one
            dimension, in the CPU's memory; may come from a stranger. Those of compressed files are handed in
            decompressed, under either name. Slices of the state that lie one behind the other in memory are
            taken as they are; others are copied together.

    Raises:
        CheckpointError: a file is missing, or is none of a checkpoint, or does not fit the others; the
            message names it.
    """
    plain = {name.removesuffix(COMPRESSED_SUFFIX): raw for name, raw in files.items()}
    for name in plain:
        if name in files and name + COMPRESSED_SUFFIX in files:
            raise CheckpointError(f"{name}{COMPRESSED_SUFFIX}: there is {name} too")
    parts: dict[str, list[str]] = {"model": [], "state": []}
    own = {}
    for name, raw in plain.items():
        if part := _PART.fullmatch(name):
            parts[part[1] or part[2]].append(name)
        elif of_rank := _RANK.fullmatch(name):
            own[int(of_rank[1])] = _read(unpack, name, raw)
        elif name != INDEX:  # which says nothing that the files of weights do not say
            raise CheckpointError(f"{name}: no file of a checkpoint has such a name")
    slices = _in_order("state", "bin", parts["state"])
    packed = slices[0] if len(slices) == 1 else f"{slices[0]} to {slices[-1]}"
    state = _read(unpack, packed, _joined([plain[name] for name in slices]))
    if not _has_model(state):
        raise CheckpointError(f"{packed}: is not the state of a training run")
    weights: dict[str, torch.Tensor] = {}
    # A model without weights has no file of them.
    for name in _in_order("model", "safetensors", parts["model"]) if parts["model"] else []:
        for weight, tensor in _read(safetensors.parse, name, plain[name]).items():
            if weight in weights:
                raise CheckpointError(f"{name}: another file has the weight {json.dumps(weight)} too")
            weights[weight] = tensor
    return Contents(_with_model(state, weights), own)


def _read(how: Callable[[torch.Tensor], Any], name: str, raw: torch.Tensor) -> Any:
    try:
        return how(raw)
    except FrameError as problem:
        raise CheckpointError(f"{name}: {problem.reason}") from None


def _has_model(state: Any) -> bool:
    parts = state.get(_MODEL) if type(state) is dict else None
    return type(parts) is dict and type(parts.get("names")) is list and type(parts.get("others")) is dict


def _with_model(state: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    parts = state[_MODEL]
    model: OrderedDict[Any, Any] = OrderedDict()
    for name in parts["names"]:
        if type(name) not in (str, int) or (name not in weights and name not in parts["others"]):
            raise CheckpointError(f"the weight {json.dumps(name)} is in none of the files")
        model[name] = weights[name] if name in weights else parts["others"][name]
    if len(model) != len(weights) + len(parts["others"]):
        unknown = next((name for name in weights if name not in model), "")
        raise CheckpointError(f"the files hold a weight {json.dumps(unknown)} that the model has not")
    return {**state, _MODEL: model}


def _in_order(stem: str, suffix: str, found: Sequence[str]) -> list[str]:
    """The names of the files that make up one.

    Raises:
        CheckpointError: one of them is missing, or they belong to different ones.
    """
    numbers = _OF.search(found[0]) if found else None
    count = int(numbers[1]) if numbers else 1
    names = []
    for index in range(count):
        names.append(numbered(stem, index, count, suffix))
        if names[-1] not in found:
            raise CheckpointError(f"{names[-1]}: is missing")
    for name in found:
        if name not in names:
            raise CheckpointError(f"{name}: does not belong with {found[0]}")
    return names


def _joined(slices: list[torch.Tensor]) -> torch.Tensor:
    """Slices as one, without copying where they lie one behind the other in memory of the same tensor."""
    end = slices[0].data_ptr()
    for part in slices:
        if (
            part.data_ptr() != end
            or part.untyped_storage().data_ptr() != slices[0].untyped_storage().data_ptr()
        ):
            return torch.cat(slices)
        end += part.numel()
    return torch.as_strided(slices[0], (sum(part.numel() for part in slices),), (1,))
