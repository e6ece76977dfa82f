"""Serves this process's training state to joining workers, live from its memory, while training pauses."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ringps.checkpoint.serving import BACKLOG, Offered, ServingLoop
from ringps.errors import ClosedError, RingpsError, SetupError
from ringps.transport.keys import JobKey

_PROMISE_S = 10.0
"""The thread looks up after every few megabytes; if that takes so long, something is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class ServerStatistics:
    """What a `StateServer` has done so far."""

    bytes_sent: int
    """Without handshakes."""

    pieces_sent: int
    """Counted when sending begins."""

    refused: Mapping[str, int]
    """Connections that were closed for what came on them, counted by reason."""


class StateServer:
    """Listens on a port, and serves a state between `offer` and `withdraw`.

    Whoever connects must prove that it knows the token, and is shown that this side does. One thread does
    everything; between its turns it looks whether it is to stop.
    """

    def __init__(self, ip: str, token: JobKey) -> None:
        """
        Args:
            ip: an address of this machine; the port is a free one.
            token: its secret half is what both sides must know.

        Raises:
            SetupError: this machine has no address `ip`.
        """
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listening.bind((ip, 0))
            self._listening.listen(BACKLOG)
        except OSError as error:
            self._listening.close()
            raise SetupError(
                f"cannot listen on {ip} to serve the training state: {error.strerror}; "
                "it must be an address of this machine"
            ) from error
        port = self._listening.getsockname()[1]
        self.address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        """`HOST:PORT`, for `fetch`."""
        self._listening.setblocking(False)
        self._changed = threading.Condition()
        self._wanted: Offered | None = None
        self._closing = False
        self._ended = False
        self._loop = ServingLoop(self._listening, token.secret)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="ringps-state", daemon=True)
        self._thread.start()

    def offer(self, skeleton: bytes, tensors: Sequence[torch.Tensor], step: int) -> None:
        """Serve this state from now on, in the place of an earlier one.

        Args:
            skeleton: as `tree.flatten` gives it.
            tensors: likewise. They are read when a client asks, and must not be written to before
                `withdraw`: what does not fit its hash any more is refused by the client.
            step: the last step that is in the state.

        Raises:
            ClosedError: `close` was called.
            ValueError: the tensors are not as `tree.flatten` gives them.
        """
        self._replace(Offered.of(skeleton, tensors, step))

    def withdraw(self) -> None:
        """Serve nothing any more: close all connections. When this returns nobody reads the tensors, and they
        may be written to. Without an offer, or after `close`, nothing happens."""
        if not self._closing:
            self._replace(None)

    def close(self) -> None:
        """Withdraw, and give the port back. May be called again."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def statistics(self) -> ServerStatistics:
        """What has been done so far."""
        loop = self._loop
        return ServerStatistics(
            bytes_sent=loop.bytes_sent,
            pieces_sent=loop.pieces_sent,
            refused=MappingProxyType(dict(loop.refused)),
        )

    def _replace(self, offered: Offered | None) -> None:
        with self._changed:
            if self._closing:
                raise ClosedError("this state server was closed; make another one to offer state")
            self._wanted = offered
            os.eventfd_write(self._wake, 1)
            self._changed.wait_for(lambda: self._loop.offered is offered or self._ended, _PROMISE_S)
            if self._loop.offered is offered:
                return
        what = "has ended because of the error printed above" if self._ended else "is stuck"
        raise RingpsError(f"the thread that serves the training state {what}; restart this worker")

    def _run(self) -> None:
        try:
            self._loop.watch(self._wake)
            while not self._closing:
                with self._changed:
                    if self._loop.offered is not self._wanted:
                        self._loop.serve(self._wanted)
                        self._changed.notify_all()
                self._loop.turn(lambda: self._closing or self._loop.offered is not self._wanted)
        finally:
            self._loop.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()
