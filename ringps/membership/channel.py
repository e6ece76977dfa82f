"""One side's connection to the coordinator: sockets, their thread, and nothing about the ring.

ZeroMQ sockets belong to one thread. Other threads put frames into a queue and wake that thread
through an eventfd, so that it sleeps while there is nothing to do.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from ringps.config import Timeouts
from ringps.errors import (
    AuthenticationError,
    ClosedError,
    CoordinatorUnreachableError,
    FrameError,
    SetupError,
)
from ringps.membership import endpoint
from ringps.membership.handshake import Handshake, Progress
from ringps.transport.keys import JobKey
from ringps.wire.control import (
    MAX_FRAME_BYTES,
    OTHER_VERSION,
    Beat,
    Hello,
    LauncherHello,
    Message,
    Refused,
    Vocabulary,
    decode,
    encode,
)

# CURVE adds this much to a frame at most.
CURVE_OVERHEAD_BYTES = 64

_RETRY_S = 0.1
_CONNECT_MS = 1500
_BEATS_QUEUED = 4
_log = logging.getLogger("ringps")


class Handler(Protocol):
    """What a link does with what it hears. Called on the channel's thread; must return at once."""

    def on_message(self, message: Any) -> None:
        """A valid message of the channel's vocabulary came."""

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        """The connection, once up, has been down for `heartbeat_timeout_s`. Comes once for each time."""


class ControlChannel:
    """A link's sockets. A connection that breaks is made again, and begins with what `greet_with` was given,
    or else with our hello again."""

    def __init__(
        self,
        coordinator: str,
        key: JobKey | None,
        timeouts: Timeouts,
        vocabulary: Vocabulary,
        handler: Handler,
    ) -> None:
        self._coordinator = coordinator
        self._key = key
        self._timeouts = timeouts
        self._vocabulary = vocabulary
        self._handler = handler
        self._greetings: tuple[bytes, ...] = ()
        self._handshake = Handshake()
        self._outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._outbox: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._wake_fd = -1
        self._linger_s: float | None = None
        self._thread: threading.Thread | None = None
        self._was_up = False
        self._down_since_s: float | None = None
        self._gone = False
        self._heartbeat: zmq.Socket[bytes]
        self._beat: Callable[[int], Beat] | None = None
        self._beats = 0
        self._beat_due_s = 0.0
        self._refused = 0

    @property
    def coordinator(self) -> str:
        """`HOST:PORT` of the coordinator."""
        return self._coordinator

    @property
    def refused(self) -> int:
        """Frames from the coordinator that did not follow the protocol."""
        return self._refused

    def open(self, hello: Hello | LauncherHello) -> None:
        """Connect and say hello; returns once both sides have shown their key.

        Raises:
            CoordinatorUnreachableError: nobody answered for `connect_timeout_s`.
            AuthenticationError: somebody did, but holds another key, or only one side holds one.
            SetupError: the coordinator's address is malformed.
            ClosedError: `close` was called meanwhile.
        """
        with self._lock:
            if self._linger_s is not None:
                raise ClosedError("this link to the coordinator is closed")
            self._greetings = (encode(hello),)
            self._connect()
            self._thread = threading.Thread(target=self._run, name="ringps-link", daemon=True)
            self._thread.start()
        try:
            error = self._outcome.get(timeout=self._timeouts.connect_timeout_s)
        except queue.Empty:
            error = self.unreachable()
        if error is not None:
            self.close(linger_s=0.0)
            raise error

    def greet_with(self, *messages: Message) -> None:
        """Begin every later connection with these messages instead of the first hello. Any thread."""
        self._greetings = tuple(map(encode, messages))

    def unreachable(self) -> CoordinatorUnreachableError:
        """The error for an answer that did not come in time."""
        tried_s = self._timeouts.connect_timeout_s
        if self._handshake.progress is Progress.NOBODY:
            return CoordinatorUnreachableError(
                f"no coordinator answers at {self._coordinator} (tried for {tried_s:g} s); "
                "is `ringps coordinator` or `ringps run` running there?"
            )
        return CoordinatorUnreachableError(
            f"something accepts connections at {self._coordinator} but does not answer "
            f"(waited for {tried_s:g} s); is it a ringps coordinator, and not frozen?"
        )

    def send(self, message: Message) -> None:
        """Queue a message; any thread. Nothing happens once the channel is closed."""
        frame = encode(message)
        with self._lock:
            if self._linger_s is None and self._thread is not None:
                self._outbox.append(frame)
                os.eventfd_write(self._wake_fd, 1)

    def start_heartbeat(self, port: int, beat: Callable[[int], Beat]) -> None:
        """Send `beat(count)` to this port from now on; on the channel's thread only.

        What cannot be sent at once is dropped: an old beat says nothing.
        """
        host = endpoint.split(self._coordinator)[0]
        if self._beat is not None:
            # Welcomed again, on another connection. Where the coordinator's machine fell silent, the one for
            # heartbeats has not broken, and leads nowhere.
            self._heartbeat.close(linger=0)
            self._heartbeat = self._heart(ipv6=":" in host)
        self._heartbeat.connect(f"tcp://{endpoint.join(host, port)}")
        self._beat = beat

    def close(self, linger_s: float) -> None:
        """Stop, after at most `linger_s` more for what is queued. Safe to call again."""
        with self._lock:
            if self._linger_s is None:
                self._linger_s = linger_s
                self._outcome.put(ClosedError("the link to the coordinator was closed"))
                if self._thread is not None:
                    os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _connect(self) -> None:
        try:
            host, port = endpoint.split(self._coordinator)
        except ValueError as error:
            raise SetupError(f"the coordinator's address {error}") from error
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        ipv6 = ":" in host
        self._control = self._dealer(ipv6)
        self._control.heartbeat_ivl = int(self._timeouts.heartbeat_timeout_s * 500)
        self._control.heartbeat_timeout = int(self._timeouts.heartbeat_timeout_s * 1000)
        self._monitor = self._control.get_monitor_socket(Handshake.EVENTS)
        self._heartbeat = self._heart(ipv6)
        try:
            self._control.connect(f"tcp://{endpoint.join(host, port)}")
        except zmq.ZMQError as error:
            self._disconnect(0.0)
            raise SetupError(
                f"cannot connect to the coordinator at {self._coordinator}: {error.strerror}"
            ) from error
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def _dealer(self, ipv6: bool) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.ipv6 = ipv6
        dealer.immediate = True  # queue nothing for a connection that is not there
        dealer.maxmsgsize = MAX_FRAME_BYTES + CURVE_OVERHEAD_BYTES
        dealer.reconnect_ivl = int(_RETRY_S * 1000)
        dealer.reconnect_ivl_max = 1000
        # Of a pod that is gone nothing answers at its address: look up where its name leads by now.
        dealer.connect_timeout = _CONNECT_MS
        if self._key is not None:
            self._key.secure_client(dealer)
        return dealer

    def _heart(self, ipv6: bool) -> zmq.Socket[bytes]:
        dealer = self._dealer(ipv6)
        dealer.sndhwm = _BEATS_QUEUED
        return dealer

    def _disconnect(self, linger_s: float) -> None:
        self._control.disable_monitor()
        self._monitor.close(linger=0)
        self._heartbeat.close(linger=0)
        self._control.close(linger=int(linger_s * 1000))
        self._context.term()  # waits for what lingers

    # On the channel's own thread.

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a bug of ours; whoever waits for this thread must not hang
            _log.exception("the link to the coordinator at %s failed", self._coordinator)
            self._outcome.put(error)
            self._report_gone(f"the link to the coordinator at {self._coordinator} failed: {error!r}")
        finally:
            with self._lock:
                linger_s, self._linger_s = self._linger_s or 0.0, 0.0
                fd, self._wake_fd = self._wake_fd, -1
            self._disconnect(linger_s)
            os.close(fd)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._control, self._monitor, self._wake_fd):
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(self._sleep_ms()))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._monitor in ready:
                self._watch()
            if self._control in ready:
                self._receive()
            self._flush()
            self._send_beat()
            self._check_gone()
            if self._linger_s is not None:
                return

    def _sleep_ms(self) -> int | None:
        dues_s = []
        if self._outbox and self._handshake.progress is Progress.UP:
            dues_s.append(time.monotonic() + _RETRY_S)
        if self._beat is not None:
            dues_s.append(self._beat_due_s)
        if self._down_since_s is not None and not self._gone:
            dues_s.append(self._down_since_s + self._timeouts.heartbeat_timeout_s)
        if not dues_s:
            return None
        return 1 + max(0, int((min(dues_s) - time.monotonic()) * 1000))

    def _watch(self) -> None:
        while self._monitor.poll(0):  # all of it, so that a hello goes before what is queued
            self._handshake.observe(recv_monitor_message(self._monitor)["event"])
            self._on_progress()

    def _on_progress(self) -> None:
        match self._handshake.progress:
            case Progress.UP:
                self._was_up, self._down_since_s, self._gone = True, None, False
                self._outbox.extendleft(reversed(self._greetings))
                self._outcome.put(None)
            case Progress.REFUSED:
                self._outcome.put(self._key_refused())
            case Progress.NOBODY if self._was_up and self._down_since_s is None:
                self._down_since_s = time.monotonic()

    def _key_refused(self) -> AuthenticationError:
        if self._key is None:
            advice = "it wants a job key and we have none; give the key file that it wrote (--key-file)"
        else:
            advice = (
                "our job key is not its key; give the key file that this coordinator wrote (--key-file), "
                "and check that it was started with one"
            )
        return AuthenticationError(f"the coordinator at {self._coordinator} refuses us: {advice}")

    def _receive(self) -> None:
        frames = self._control.recv_multipart()
        try:
            if len(frames) != 1:
                raise FrameError("not a single frame")
            message = decode(frames[0], self._vocabulary)
        except FrameError as error:
            self._refused += 1
            if error.reason != OTHER_VERSION:
                return
            message = Refused(reason="it speaks another protocol; install the same ringps on all machines")
        self._tell(lambda: self._handler.on_message(message))

    def _flush(self) -> None:
        while self._outbox and self._handshake.progress is Progress.UP:
            try:
                self._control.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._outbox.popleft()

    def _send_beat(self) -> None:
        now_s = time.monotonic()
        if self._beat is None or now_s < self._beat_due_s:
            return
        self._beat_due_s = now_s + self._timeouts.heartbeat_interval_s
        self._beats += 1
        try:
            self._heartbeat.send(encode(self._beat(self._beats)), zmq.NOBLOCK)
        except zmq.Again:
            pass  # not connected

    def _check_gone(self) -> None:
        if self._down_since_s is None:
            return
        if time.monotonic() >= self._down_since_s + self._timeouts.heartbeat_timeout_s:
            self._report_gone(f"the coordinator at {self._coordinator} is gone")

    def _report_gone(self, reason: str) -> None:
        if not self._gone:
            self._gone = True
            self._tell(lambda: self._handler.on_gone(CoordinatorUnreachableError(reason)))

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # the handler's bug must not cost us our heartbeats
            _log.exception("a handler of messages from the coordinator failed")
