"""How a connection to the coordinator comes up, or why it does not, from ZeroMQ's monitor events."""

from __future__ import annotations

import enum

import zmq

# A server that dies while we connect looks like one that throws us out, but not so many times.
_FAILURES_THAT_MEAN_REFUSAL = 3


class Progress(enum.Enum):
    """How far a connection is."""

    NOBODY = enum.auto()
    """Nobody accepts connections there."""
    SILENT = enum.auto()
    """Somebody does, but the handshake is not over."""
    UP = enum.auto()
    """Both sides have shown their key."""
    REFUSED = enum.auto()
    """The handshake fails, and would again."""


class Handshake:
    """Follows one socket's connection attempts.

    Without a key on one side only, libzmq reports a protocol error and gives up. With two
    different keys the server cannot decrypt our first message and just hangs up, each time.
    """

    EVENTS = (
        zmq.EVENT_CONNECTED
        | zmq.EVENT_CLOSED
        | zmq.EVENT_DISCONNECTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )

    def __init__(self) -> None:
        self.progress = Progress.NOBODY
        self._failures = 0

    def observe(self, event: int) -> None:
        """Take in one monitor event."""
        if self.progress is Progress.REFUSED:
            return
        match event:
            case zmq.EVENT_CONNECTED:
                self.progress = Progress.SILENT
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.progress, self._failures = Progress.UP, 0
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.progress = Progress.REFUSED
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failures += 1
                if self._failures >= _FAILURES_THAT_MEAN_REFUSAL:
                    self.progress = Progress.REFUSED
            case zmq.EVENT_CLOSED:
                self.progress, self._failures = Progress.NOBODY, 0
            case zmq.EVENT_DISCONNECTED:
                self.progress = Progress.NOBODY
