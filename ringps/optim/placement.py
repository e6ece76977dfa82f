"""Where the tensors of a state that was loaded belong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def placed_like(state: Any, live: Callable[[], Any]) -> Any:
    """A nested state with each tensor on the device where the live state has the one at the same place.

    What was saved or fetched lies in the CPU's memory, and not everybody who loads a state moves its tensors
    to where they were.

    Args:
        state: dicts, lists and tuples of tensors and other things; is only read.
        live: gives a state of the same structure, as far as that goes; tensors that it has no counterpart for
            stay where they are. Not called if `state` has no tensors.

    Returns:
        The state itself if nothing has to move, else new containers around what stays.
    """
    return _placed(state, live()) if _has_tensors(state) else state


def _has_tensors(state: Any) -> bool:
    if isinstance(state, dict):
        return any(map(_has_tensors, state.values()))
    if type(state) in (list, tuple):
        return any(map(_has_tensors, state))
    return isinstance(state, torch.Tensor)


def _placed(state: Any, live: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.to(live.device) if isinstance(live, torch.Tensor) else state
    if isinstance(state, dict):
        others = live if isinstance(live, Mapping) else {}
        moved = {key: _placed(value, others.get(key)) for key, value in state.items()}
        if all(moved[key] is value for key, value in state.items()):
            return state
        result = copy.copy(state)  # of the same type, with what is attached to it
        result.update(moved)
        return result
    if type(state) in (list, tuple):
        same = isinstance(live, Sequence) and len(live) == len(state)
        items = [_placed(value, live[at] if same else None) for at, value in enumerate(state)]
        if all(item is value for item, value in zip(items, state, strict=True)):
            return state
        return type(state)(items)
    return state
