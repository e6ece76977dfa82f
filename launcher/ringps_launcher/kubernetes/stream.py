"""A stream of lines from the API server (a watch, a log) that another thread can end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LONGEST_LINE_BYTES = 8 << 20


class Stream(Generic[T]):
    """Iterate over it in one thread; `close()` from any thread ends that.

    The request is made by the first `next()`. Whoever stops early calls `close()`, or uses it in a `with`.
    """

    def __init__(self, items: Callable[[Stream[T]], Iterator[T]]) -> None:
        self._lock = threading.Lock()
        self._response: Any = None
        self._closed = False
        self._items = items(self)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        return next(self._items)

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        """Of the thread that reads: the connection is given back at once, too."""
        self.close()
        if isinstance(self._items, Generator):
            self._items.close()

    def close(self) -> None:
        """End it: a thread that reads (or comes to read) sees the end. May be called any number of times.

        A reader that still waits for the first byte of the answer notices within the read timeout."""
        with self._lock:
            self._closed = True
            response = self._response
        if response is not None:
            _wake(response)

    def attach(self, response: Any) -> bool:
        """Read from `response` from now on; False if it was closed before, then nothing must be read."""
        with self._lock:
            self._response = response
            return not self._closed

    def detach(self) -> None:
        """Done with the response."""
        with self._lock:
            self._response = None


def lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a byte stream without their ends; the last one even if it is cut off. A line that has no
    end after 8 MiB is handed on in pieces: memory is bounded."""
    rest = bytearray()
    for chunk in chunks:
        start = len(rest)
        rest += chunk
        first = 0
        while (end := rest.find(b"\n", max(first, start))) >= 0:
            yield bytes(rest[first:end])
            first = end + 1
            start = first
        del rest[:first]
        if len(rest) > _LONGEST_LINE_BYTES:
            yield bytes(rest)
            rest.clear()
    if rest:
        yield bytes(rest)


def _wake(response: Any) -> None:
    try:
        response.shutdown()  # a thread in recv() sees the end of the stream
    except (OSError, ValueError, RuntimeError):
        pass  # it is at its end already
