"""Relays TCP connections from the pods' network to servers on this machine's loopback address."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

_CONNECT_S = 5.0
_AT_ONCE = struct.pack("ii", 1, 0)  # closing resets the connection


class Relay:
    """Passes what comes in at `listening` on to `target`; when that does not answer, the connection is reset.

    Listening goes on however `target` fares: behind it, a server may come and go.
    """

    def __init__(self, listening: socket.socket, target: tuple[str, int]) -> None:
        self._listening = listening
        self._target = target
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads: set[threading.Thread] = set()
        self._start(self._accept)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for each in [self._listening, *self._open]:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._listening.close()

    def _start(self, work: object, *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)  # type: ignore[operator]
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="kubelet-relay", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(client.close)
            try:
                server = socket.create_connection(self._target, _CONNECT_S)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                return
            stack.callback(server.close)
            server.settimeout(None)
            with self._lock:
                if self._closed:
                    return
                self._open |= {client, server}
            try:
                back = threading.Thread(
                    target=_pump, args=(server, client), name="kubelet-relay", daemon=True
                )
                back.start()
                _pump(client, server)
                back.join()
            finally:
                with self._lock:
                    self._open -= {client, server}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Until the source ends; then the sink hears of it too."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
    else:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
