"""A checkpoint's training state as values and files that need no ringps."""

from __future__ import annotations

import os
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_saver

from ringps.checkpoint import files
from ringps.checkpoint.contents import assemble
from ringps.checkpoint.directory import Directory
from ringps.errors import CheckpointError

_OURS = "member"
"""The part of a training state that only ringps has a use for."""

_INTEGERS = {"m": "i8", "M": "i8"}
"""Kinds of numpy's dtypes that torch lacks, and which have the same bytes: times are counted in int64."""


def read_state(directory: Directory, name: str) -> dict[str, Any]:
    """The training state of a checkpoint, without what is each rank's own.

    Args:
        directory: where it lies.
        name: its entry.

    Raises:
        CheckpointError: it is damaged; the message names the file.
        OSError: it cannot be read.
    """
    manifest = directory.manifest(name)
    common = [entry for entry in manifest.files if entry.kind != "rank"]
    return assemble(files.read_all(directory.store, name, common)).state


def write(state: dict[str, Any], path: Path, format: str) -> None:
    """Write a training state that is `plain`, durably.

    Args:
        state: by part; what only ringps has a use for is left out.
        path: does not exist.
        format: "torch" or "dcp". The latter takes a process without a process group.

    Raises:
        OSError: it cannot be written.
    """
    if format == "torch":
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return
    assert format == "dcp"
    with warnings.catch_warnings():
        # It takes a missing process group for a mistake.
        warnings.filterwarnings("ignore", "torch.distributed is .*assuming the intent is to save")
        state_dict_saver.save(state, checkpoint_id=path)


def portable(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The parts of a training state that are of use without ringps, `plain`."""
    return {part: plain(value, f"{name}: {part}") for part, value in state.items() if part != _OURS}


def plain(value: Any, name: str) -> Any:
    """A nested state as `torch.load(weights_only=True)` can read it back. Its tensors are copies, each in
    memory of its own: of one that shares memory with others, torch saves all of that.

    Args:
        value: what `tree.unflatten` gives.
        name: what to call it in errors.

    Raises:
        CheckpointError: there is a number in it that torch does not have.
    """
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return _tensor(value, name)
    if isinstance(value, np.generic):
        tensor = _tensor(np.asarray(value), name)
        return tensor if tensor.is_complex() else tensor.item()
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, plain(item, f"{name}[{key!r}]")) for key, item in value.items())
        if (metadata := getattr(value, "_metadata", None)) is not None:
            ordered._metadata = plain(metadata, f"{name}._metadata")  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, Counter):
        return Counter({key: plain(item, f"{name}[{key!r}]") for key, item in value.items()})
    if isinstance(value, dict):
        return {key: plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{name}[{number}]") for number, item in enumerate(value))
    return value


def _tensor(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    native = array.astype(array.dtype.newbyteorder("="))
    integers = _INTEGERS.get(native.dtype.kind)
    try:
        return torch.from_numpy(native if integers is None else native.view(integers))
    except TypeError:
        raise CheckpointError(f"{name} is of numpy's {array.dtype}, which torch does not have") from None
