"""Noticing gradients: hooks on parameters, and where a backward pass begins and ends."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

_BACKWARD_CODES = frozenset({torch.autograd.backward.__code__, torch.autograd.grad.__code__})


class PassListener(Protocol):
    """Is told what happens in backward passes, on the thread that runs them.

    What it raises comes out of the user's `backward()`.
    """

    def begin(self) -> None:
        """The first gradient of a pass is about to be reported."""

    def factor(self) -> float:
        """What the gradients of this pass are to be multiplied by before they are accumulated."""

    def arrived(self, key: int) -> None:
        """The parameter of this id has its gradient in `.grad`."""

    def complete(self) -> bool:
        """Every parameter's gradient has arrived in this pass."""

    def end(self) -> None:
        """The pass has ended well; `backward()` returns after this."""

    def abandoned(self) -> None:
        """The pass was ended by an exception."""


class GradientHooks:
    """Reports the gradients of parameters to a listener, pass by pass.

    Autograd has no hook for the beginning or the end of a backward pass. The first gradient begins
    one and queues a callback on the engine for its end; an exception in between leaves it open
    until the next pass, or `settle`, finds it so. A backward within a backward (reentrant
    checkpointing) belongs to the outer pass. It is told from a new one by the outermost `backward`
    frame on the stack, since its callback would come at the end of the inner one. Where the outer one
    has no gradients of its own, the pass ends with the last parameter's.
    """

    def __init__(self, listener: PassListener) -> None:
        self._listener = weakref.ref(listener)
        self._task = -1
        self._open = False
        self._anchored = False
        self._frame: FrameType | None = None

    def watch(self, parameter: torch.nn.Parameter, *, scaled: bool) -> list[RemovableHandle]:
        """Report `parameter`, until the handles are removed.

        The hooks keep neither this object nor the listener alive.

        Args:
            parameter: a leaf that requires a gradient.
            scaled: multiply incoming gradients by the listener's `factor()`.
        """
        reference, key = weakref.ref(self), id(parameter)

        def report(_: torch.Tensor) -> None:
            hooks = reference()
            if hooks is not None:
                hooks._enter().arrived(key)

        def scale(gradient: torch.Tensor) -> torch.Tensor | None:
            hooks = reference()
            factor = 1.0 if hooks is None else hooks._enter().factor()
            return None if factor == 1.0 else gradient * factor

        handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(report)  # type: ignore[no-untyped-call]
        ]
        if scaled:
            handles.append(parameter.register_hook(scale))  # type: ignore[no-untyped-call]
        return handles

    def settle(self, *, strict: bool) -> None:
        """Close a pass that an exception left open. Not to be called from within a backward.

        Raises:
            RuntimeError: with `strict`, if it cannot be told whether the pass ended well.
        """
        if not self._open:
            return
        noticed = self._anchored
        self._close().abandoned()
        if strict and not noticed:
            raise RuntimeError(
                "the last backward() ran all of its layers inside reentrant activation checkpointing and "
                "left parameters without a gradient, so its end could not be noticed and its gradients were "
                "not reduced (or an exception ended it); use torch.utils.checkpoint with use_reentrant=False"
            )

    def _enter(self) -> PassListener:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._enter_task()
        listener = self._listener()
        assert listener is not None
        return listener

    def _enter_task(self) -> None:
        frame, depth = _outermost_backward()
        if self._open and (frame is None or frame is not self._frame):
            task = self._task
            self.settle(strict=True)
            self._task = task
        begins = not self._open
        if begins:
            self._open, self._frame = True, frame
        if depth > 1 and not self._anchored:
            _queue(self._nested_end)
        elif not self._anchored:
            self._anchored = True
            _queue(self._end)
        if begins:
            listener = self._listener()
            assert listener is not None
            listener.begin()

    def _nested_end(self) -> None:
        listener = self._listener()
        if self._open and not self._anchored and listener is not None and listener.complete():
            self._end()

    def _end(self) -> None:
        self._close().end()

    def _close(self) -> PassListener:
        self._open = self._anchored = False
        self._frame, self._task = None, -1
        listener = self._listener()
        assert listener is not None
        return listener


def _queue(callback: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(callback)


def _outermost_backward() -> tuple[FrameType | None, int]:
    """The outermost frame on this thread that runs a backward, and how many do."""
    outermost, depth = None, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _BACKWARD_CODES:
            outermost, depth = frame, depth + 1
        frame = frame.f_back
    return outermost, depth
