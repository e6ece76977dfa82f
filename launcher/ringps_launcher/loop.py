"""One thread that waits for everything at once: descriptors, signals and other threads' messages."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

Callback = Callable[[], object]


def stop_signals() -> list[signal.Signals]:
    """The signals that ask us to end. Under nohup, a closing terminal does not."""
    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked


class Loop:
    """A selectors loop. Only `post` may be called from another thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callback] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.add_reader(self._bell, self._run_posted)
        self._signals: SignalPipe | None = None
        self._on_signal: Callable[[int], None] | None = None

    def add_reader(self, descriptor: int, callback: Callback) -> None:
        """Call back whenever the descriptor is readable or at its end."""
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def add_writer(self, descriptor: int, callback: Callback) -> None:
        """Call back whenever the descriptor takes bytes."""
        self._selector.register(descriptor, selectors.EVENT_WRITE, callback)

    def remove(self, descriptor: int) -> None:
        """Stop watching; does nothing for a descriptor that is not watched."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)

    def post(self, callback: Callback) -> None:
        """From any thread: have `callback` run on the loop's thread."""
        self._posted.append(callback)
        os.eventfd_write(self._bell, 1)

    def catch_signals(self, numbers: Iterable[signal.Signals], callback: Callable[[int], None]) -> None:
        """Have these signals' numbers passed to `callback` from the loop until `close`."""
        self._signals = SignalPipe(numbers)
        self._on_signal = callback
        self.add_reader(self._signals.descriptor, self._run_signals)

    def run_once(self, timeout_s: float | None) -> None:
        """Wait, no longer than this, and run the callbacks of what is ready."""
        timeout_s = None if timeout_s is None else max(0.0, timeout_s)
        for key, _ in self._selector.select(timeout_s):
            # An earlier callback of this round may have removed this descriptor.
            if self._selector.get_map().get(key.fd) is key:
                key.data()

    def close(self) -> None:
        """Give the signals back and stop watching; `post` must not be called any more."""
        if self._signals is not None:
            self._signals.close()
        self._selector.close()
        os.close(self._bell)

    def _run_signals(self) -> None:
        assert self._signals is not None and self._on_signal is not None
        for number in self._signals.read():
            self._on_signal(number)

    def _run_posted(self) -> None:
        os.eventfd_read(self._bell)
        while self._posted:
            self._posted.popleft()()


class SignalPipe:
    """Turns signals into bytes that can be waited for."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self.descriptor, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before: dict[signal.Signals, Any] = {n: signal.signal(n, _ignore) for n in numbers}

    def read(self) -> list[int]:
        """The signals that came since the last call."""
        try:
            return [number for number in os.read(self.descriptor, 4096) if number in self._before]
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_wakeup)
        os.close(self.descriptor)
        os.close(self._write)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The byte in the pipe is all that is needed."""
