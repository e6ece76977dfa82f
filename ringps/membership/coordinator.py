"""The coordinator: sockets, a thread and a clock around the decisions of `quorum`.

Two ROUTER sockets, for control messages and for heartbeats, so that neither can hold up the
other. What comes in is bounded per peer by high-water marks and `MAX_REPORT_BYTES`, and unknown
peers are not remembered. Nothing here waits for a peer: a message for one that does not read is
dropped. (libzmq itself keeps the parts of a multi-part message until its last part has come; only
a holder of the job key can send one.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import zmq

from ringps.config import Timeouts
from ringps.errors import AddressInUseError, FrameError, SetupError
from ringps.membership import endpoint
from ringps.membership.channel import CURVE_OVERHEAD_BYTES
from ringps.membership.events import (
    Action,
    Beaten,
    Emit,
    Event,
    Finish,
    Outside,
    QuorumSettings,
    Received,
    Record,
    Refuse,
    Send,
    StartAgain,
    Tick,
)
from ringps.membership.quorum import Quorum
from ringps.membership.restarts import RingRestarts
from ringps.membership.surroundings import Budget, Surroundings
from ringps.transport.keys import JobKey
from ringps.transport.zap import ZapResponder
from ringps.wire.control import (
    HEARTBEATS,
    OTHER_VERSION,
    TO_COORDINATOR,
    Beat,
    JobEvent,
    JobFailed,
    Message,
    Refused,
    Vocabulary,
    decode,
    encode,
)
from ringps.wire.rules import MAX_WORKERS

MAX_REPORT_BYTES = 16 * 1024
"""Longest frame that a coordinator takes; a peer that sends a longer one is disconnected."""

TICK_S = 0.05
"""Granularity of all of the coordinator's timers."""

_BATCH = 256
_RECEIVE_QUEUE = 256
_SEND_QUEUE = 4096
_LINGER_S = 1.0
_TRACEBACKS = 10


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """What a coordinator is told when it starts."""

    host: str = "127.0.0.1"
    """Name or IP address to listen on."""

    port: int = 0
    """Port for control messages; heartbeats go to the next one. 0 picks two free ones."""

    world_size: int | None = None
    """Workers of the job; None to go by the launchers that come."""

    settle_s: float = 3.0
    """Without a world size: how long no launcher may have come before the job starts."""

    encrypt_data: bool = False
    """Whether data connections are encrypted even if no launcher asks for it."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    """Limits on waiting."""

    min_workers: int | None = None
    """With how many members the ring goes on after a loss; None: with all of them only."""

    max_restarts: int | None = None
    """How often the whole ring is started again, from the latest checkpoint, after a failure that it did
    not survive. None: whoever started this coordinator decides on that, by `JobFailed.restarts`, and
    starts another coordinator."""

    first_generation: int = 1
    """Number of the first generation: `next_generation` of the coordinator before, where the whole ring
    is started again with this one."""

    pods: bool = False
    """Whether launchers are pods of a cluster: each comes with its worker ids and may be replaced at any
    time. The job goes on, with new starts of its ring, until it is done, or `max_restarts` workers have
    failed by themselves; it needs a `world_size`."""

    follows: bool = False
    """Of pods: whether an earlier coordinator has formed generation `first_generation`, whose members may
    come back, and perhaps later ones."""

    failures: int = 0
    """Of pods: how many workers have failed under earlier coordinators."""

    verdict: str = ""
    """Of pods: how the job ended under an earlier coordinator, as `on_verdict` was told; "" if it did not."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65534:
            raise ValueError(f"port must be from 0 to 65534 (heartbeats take the next), not {self.port}")
        if self.world_size is not None and not 1 <= self.world_size <= MAX_WORKERS:
            raise ValueError(f"world_size must be from 1 to {MAX_WORKERS}, not {self.world_size}")
        if self.min_workers is not None:
            most = MAX_WORKERS if self.world_size is None else self.world_size
            if not 1 <= self.min_workers <= most:
                limit = f"{most}, the world_size" if self.world_size is not None else str(most)
                raise ValueError(f"min_workers must be from 1 to {limit}, not {self.min_workers}")
        if self.max_restarts is not None and self.max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, not {self.max_restarts}")
        if self.first_generation < 1:
            raise ValueError(f"first_generation must be at least 1, not {self.first_generation}")
        if self.pods and (self.world_size is None or self.max_restarts is None):
            raise ValueError("with pods, the coordinator needs a world_size and max_restarts")
        if self.failures < 0:
            raise ValueError(f"failures must be at least 0, not {self.failures}")
        if not self.settle_s >= 0:
            raise ValueError(f"settle_s must be at least 0, not {self.settle_s}")


@dataclass(frozen=True, kw_only=True)
class CoordinatorStatistics:
    """What a coordinator has seen so far."""

    frames_received: int = 0
    """Frames on both sockets, the refused ones included."""

    refused: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Frames that were not acted upon, by reason. The number of reasons is bounded."""

    connections_refused: int = 0
    """Connections that did not prove to hold the job key."""

    generation: int = 0
    """Number of the generation; 0 while none was prepared."""

    members: int = 0
    """Workers that take part now."""

    launchers: int = 0
    """Launchers that take part now."""

    internal_errors: int = 0
    """Bugs: exceptions that were caught, printed and survived."""


class Coordinator:
    """Serves one job, all starts of its ring, from a thread of its own in this process."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        key: JobKey | None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_verdict: Callable[[str], None] | None = None,
    ) -> None:
        """Listen; `start` then serves.

        Args:
            settings: where to listen, and what is known of the job.
            key: whoever holds it may take part; None admits every process of this machine.
            on_event: called on the coordinator's thread with every line for the events file.
            on_verdict: of pods, called on the coordinator's thread with how the job ends. Nobody hears of it
                before `tell(Recorded())`.

        Raises:
            AddressInUseError: a port is taken.
            SetupError: `key` is None and other machines could connect, or nobody can listen there.
        """
        ip = endpoint.resolve(settings.host)
        if key is None and not endpoint.is_loopback(ip):
            raise SetupError(
                f"listening on {settings.host} without a job key would let anybody join; "
                "give a key (--key-file), or listen on 127.0.0.1"
            )
        self._on_event = on_event
        self._on_verdict = on_verdict
        self._outside: deque[Outside] = deque()
        self._key = key
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = None if key is None else ZapResponder(self._context, key)
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._control, port = self._listen(ip, settings.port, settings.host)
            self._heartbeat, heartbeat_port = self._listen(
                ip, settings.port + 1 if settings.port else 0, settings.host
            )
        except BaseException:
            self._release(0.0)
            raise
        self.address = endpoint.join(settings.host, port)
        """`HOST:PORT` where it listens."""
        self._settings = QuorumSettings(
            world_size=settings.world_size,
            settle_s=settings.settle_s,
            encrypt_data=settings.encrypt_data,
            heartbeat_port=heartbeat_port,
            timeouts=settings.timeouts,
            min_workers=settings.min_workers,
            first_generation=settings.first_generation,
            pods=settings.pods,
            follows=settings.follows,
            verdict=settings.verdict,
        )
        self._restarts = None
        budget = None
        if settings.max_restarts is not None:
            self._restarts = RingRestarts(None if settings.pods else settings.max_restarts)
            budget = Budget(settings.max_restarts, settings.failures) if settings.pods else None
        self._surroundings = Surroundings(budget)
        self._quorum = Quorum(self._settings, _new_token, self._restarts, self._surroundings)
        self._start_again_s: float | None = None
        self._frames_received = 0
        self._refused: Counter[str] = Counter()
        self._internal_errors = 0
        self._failure: JobFailed | None = None
        self._suspended = False
        self._last_message: Message | None = None
        self._last_frame = b""
        self._statistics = CoordinatorStatistics()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ringps-coordinator", daemon=True)

    def start(self) -> None:
        """Serve, until `close`."""
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the job is over or `close` was called; False if the time was up first."""
        return self._over.wait(timeout_s)

    def close(self) -> None:
        """Stop listening, once what was said last is out or a second has passed. Safe to call again."""
        with self._lock:
            first, self._closing = not self._closing, True
            started = self._thread.ident is not None
            if first and started:
                os.eventfd_write(self._wake_fd, 1)
        if started:
            self._thread.join()
        elif first:
            self._release(0.0)
        self._over.set()

    def tell(self, event: Outside) -> None:
        """What the cluster says. Any thread; nothing happens once the coordinator is closed."""
        with self._lock:
            if not self._closing:
                self._outside.append(event)
                os.eventfd_write(self._wake_fd, 1)

    @property
    def failure(self) -> JobFailed | None:
        """Which worker's failure ended the job, once that is certain; None if none did, or if the whole ring
        is started again."""
        return self._failure

    @property
    def suspended(self) -> bool:
        """Whether the job is over because it stopped at a checkpoint."""
        return self._suspended

    @property
    def next_generation(self) -> int:
        """What `first_generation` must be if the whole ring is started again with another coordinator. Call
        it after `close`."""
        return self._quorum.next_generation

    def statistics(self) -> CoordinatorStatistics:
        """What it has seen, as of a moment ago."""
        return self._statistics

    # Sockets.

    def _listen(self, ip: str, port: int, name: str) -> tuple[zmq.Socket[bytes], int]:
        router = self._context.socket(zmq.ROUTER)
        self._sockets.append(router)
        router.ipv6 = ":" in ip
        router.maxmsgsize = MAX_REPORT_BYTES + CURVE_OVERHEAD_BYTES
        router.rcvhwm, router.sndhwm = _RECEIVE_QUEUE, _SEND_QUEUE
        if self._key is not None:
            router.zap_domain = b"ringps"
            router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # refuse, should nobody answer ZAP any more
            self._key.secure_server(router)
        where = endpoint.join(name, port)
        try:
            router.bind(f"tcp://{endpoint.join(ip, port or '*')}")
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"{where} is in use by another process; stop that one, or choose another port "
                    "(a coordinator needs two in a row: the second one is for heartbeats)"
                ) from error
            raise SetupError(f"cannot listen on {where}: {error.strerror}") from error
        bound = router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return router, int(bound.rstrip(b"\0").rpartition(b":")[2])

    def _release(self, linger_s: float) -> None:
        for router in self._sockets:
            router.close(linger=int(linger_s * 1000))
        if self._zap is not None:
            self._zap.close()
        self._context.term()  # waits for what lingers
        os.close(self._wake_fd)

    # On the coordinator's own thread.

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            for source in (self._control, self._heartbeat, self._wake_fd):
                poller.register(source, zmq.POLLIN)
            next_tick_s = time.monotonic()
            while not self._closing:
                now_s = time.monotonic()
                if self._start_again_s is not None and now_s >= self._start_again_s:
                    self._start_again(now_s)
                if now_s >= next_tick_s:
                    next_tick_s = now_s + TICK_S
                    self._handle(Tick(), now_s)
                self._publish()
                poller.poll(1 + max(0, int((next_tick_s - time.monotonic()) * 1000)))
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                while self._outside:
                    self._handle(self._outside.popleft(), time.monotonic())
                # Both sockets are drained before the next tick judges who is silent.
                self._drain(self._heartbeat, HEARTBEATS, _beaten)
                self._drain(self._control, TO_COORDINATOR, Received)
        except BaseException:
            self._report_bug()
        finally:
            with self._lock:
                self._closing = True
            self._publish()
            self._release(_LINGER_S)
            self._over.set()

    def _start_again(self, now_s: float) -> None:
        """Serve the next start of the ring."""
        self._start_again_s = None
        waiting, first = self._quorum.waiting_launchers, self._quorum.next_generation
        self._settings = replace(self._settings, first_generation=first, follows=False, again=True)
        self._surroundings.recorded = False
        self._quorum = Quorum(self._settings, _new_token, self._restarts, self._surroundings)
        for peer, hello in waiting:
            self._handle(Received(peer, hello), now_s)

    def _drain(
        self, router: zmq.Socket[bytes], vocabulary: Vocabulary, event: Callable[[bytes, Any], Event]
    ) -> None:
        for _ in range(_BATCH):
            try:
                peer = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frames = 0
            frame = b""
            while router.getsockopt(zmq.RCVMORE):
                part = router.recv()
                frames += 1
                frame = part if frames == 1 else b""
            self._frames_received += 1
            try:
                if frames != 1:
                    raise FrameError("not a single frame")
                message = decode(frame, vocabulary)
            except FrameError as error:
                self._refused[error.reason] += 1
                if error.reason == OTHER_VERSION and router is self._control:
                    self._send(peer, encode(_OTHER_PROTOCOL))
                continue
            self._handle(event(peer, message), time.monotonic())

    def _handle(self, event: Event, now_s: float) -> None:
        try:
            actions = self._quorum.handle(event, now_s)
        except Exception:  # a bug of ours must not end the service for everybody
            self._report_bug()
            return
        for action in actions:
            try:
                self._act(action)
            except Exception:
                self._report_bug()

    def _act(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                if isinstance(message, JobFailed) and not (message.restarts and self._restarts is not None):
                    self._failure = message
                self._send(peer, self._encoded(message))
            case Emit(event, launchers):
                self._emit({"t": time.time(), **event}, launchers)
            case Refuse(reason):
                self._refused[reason] += 1
            case Finish(suspended=suspended):
                self._suspended = suspended
                self._publish()  # whoever waits for the end is to see all that led to it
                self._over.set()
            case Record(verdict):
                assert self._on_verdict is not None
                self._on_verdict(verdict)
            case StartAgain(delay_s):
                self._start_again_s = time.monotonic() + delay_s

    def _encoded(self, message: Message) -> bytes:
        # The same message often goes to everybody, and may be long.
        if message is not self._last_message:
            self._last_message, self._last_frame = message, encode(message)
        return self._last_frame

    def _send(self, peer: bytes, frame: bytes) -> None:
        try:
            self._control.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.Again:
            pass  # it does not read; everybody else must not wait for it

    def _emit(self, event: dict[str, Any], launchers: tuple[bytes, ...]) -> None:
        if launchers:
            frame = encode(JobEvent(event=event))
            for peer in launchers:
                self._send(peer, frame)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                self._report_bug()

    def _report_bug(self) -> None:
        self._internal_errors += 1
        if self._internal_errors > _TRACEBACKS:
            return
        print("ringps: internal error in the coordinator:", file=sys.stderr)
        traceback.print_exc()
        if self._on_event is not None:
            try:
                self._on_event(
                    {
                        "t": time.time(),
                        "event": "coordinator_error",
                        "reason": traceback.format_exc(limit=0).strip(),
                    }
                )
            except Exception:
                traceback.print_exc()

    def _publish(self) -> None:
        self._statistics = CoordinatorStatistics(
            frames_received=self._frames_received,
            refused=MappingProxyType(dict(self._refused)),
            connections_refused=0 if self._zap is None else self._zap.refused,
            generation=self._quorum.generation,
            members=self._quorum.members,
            launchers=self._quorum.launchers,
            internal_errors=self._internal_errors,
        )


_OTHER_PROTOCOL = Refused(reason="another protocol version; install the same ringps on all machines")


def _beaten(_: bytes, beat: Beat) -> Beaten:
    return Beaten(beat)


def _new_token() -> tuple[str, str]:
    token = JobKey.generate()
    return token.public.decode(), token.secret.decode()
