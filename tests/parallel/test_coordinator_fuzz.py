"""A ring stays unharmed while other holders of the job key throw a million bad frames at its coordinator."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgpack
import pytest
import zmq

from ringps.config import Timeouts
from ringps.membership import Coordinator, CoordinatorSettings, JobKey, LauncherLink, WorkerLink
from ringps.membership.coordinator import MAX_REPORT_BYTES
from ringps.wire.control import (
    PROTOCOL_VERSION,
    Admitting,
    AllLeft,
    Ask,
    Beat,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Failing,
    Form,
    Hello,
    LauncherHello,
    LauncherLeaving,
    Leaving,
    Lost,
    Message,
    Noted,
    Offer,
    Ready,
    Suspect,
    WorkerExited,
    encode,
)
from ringps.wire.rules import Seat
from ringps.worker_env import WorkerEnv

FRAMES = 1_000_000
THROWERS = 2
FRAMES_PER_SOCKET = 12_500
SEED = 20_250_101
SESSION = "0123456789abcdef" * 2
PATIENCE_S = 60.0
GROWTH_LIMIT_BYTES = 64 * 1024 * 1024

# What members, launchers and the coordinator say, as a stranger may have seen it (but for the
# session, which no stranger sees), and the same of other generations.
REPLAYS: tuple[Message, ...] = (
    *(
        Hello(
            worker_id=worker_id,
            host="here",
            pid=1,
            generation=generation,
            members=(Seat(worker_id, "here", 1),) if generation else (),
            program="",
            session=SESSION,
        )
        for worker_id, generation in ((0, 0), (1, 1), (2, 0), (1, 2), (0, 2**40))
    ),
    *(
        message
        for generation in (0, 1, 2, 2**40)
        for message in (
            Bound(generation=generation, address="tcp://127.0.0.1:1"),
            Leaving(generation=generation, completed=7),
            Dispute(generation=generation, sequence=7),
            CallReport(generation=generation, sequence=7, call="barrier()"),
            Suspect(generation=generation, worker_id=1, forming=True, reason="a lie"),
            Admitting(generation=generation),
            Offer(generation=generation, step=9, joiners=(1,), address="127.0.0.1:1"),
            Departing(generation=generation, step=9),
            Beat(worker_id=0, session=SESSION, generation=generation, step=9, count=2**50),
            Beat(worker_id=1, session=SESSION, generation=generation, step=0, count=1),
            AllLeft(generation=generation),
            Form(generation=generation, addresses=("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")),
            Lost(generation=generation, rank=0, worker_id=0, host="here", reason="a lie"),
        )
    ),
    Ask(),
    Failing(reason="a lie", blames=0),
    Ready(),
    Noted(event={"event": "straggler"}),
    WorkerExited(worker_id=1, pid=1, code=137, reason="a lie"),
    *(
        LauncherHello(
            host="elsewhere",
            address="10.0.0.9",
            slots=1,
            master_port=1,
            encrypt_data=False,
            first_worker_id=first,
            world_size=world_size,
            session=SESSION,
        )
        for first, world_size in ((None, None), (0, 2), (1, 1), (0, None))
    ),
    LauncherLeaving(),
)
VALID = tuple(encode(message) for message in REPLAYS)


class Garbage:
    """An endless stream of bad messages, each a list of frames; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], list[bytes]], ...] = (
            self._replayed,
            self._noise,
            self._truncated,
            self._changed,
            self._extended,
            self._foreign_fields,
            self._other_version,
            self._many_frames,
            self._long,
        )
        self._weights = (30, 15, 15, 20, 5, 5, 5, 4, 1)

    def take(self, count: int) -> list[list[bytes]]:
        return [kind() for kind in self._random.choices(self._kinds, self._weights, k=count)]

    def _replayed(self) -> list[bytes]:
        return [self._random.choice(VALID)]

    def _noise(self) -> list[bytes]:
        return [self._random.randbytes(self._random.randrange(0, 64))]

    def _truncated(self) -> list[bytes]:
        frame = self._random.choice(VALID)
        return [frame[: self._random.randrange(len(frame))]]

    def _changed(self) -> list[bytes]:
        frame = bytearray(self._random.choice(VALID))
        for _ in range(self._random.randrange(1, 4)):
            frame[self._random.randrange(len(frame))] = self._random.randrange(256)
        return [bytes(frame)]

    def _extended(self) -> list[bytes]:
        return [self._random.choice(VALID) + self._random.randbytes(3)]

    def _foreign_fields(self) -> list[bytes]:
        version, name, values = msgpack.unpackb(self._random.choice(VALID))
        values[self._random.choice(("worker_id", "generation", "reason", "\x00"))] = self._random.choice(
            (None, -1, 2**63, 1e300, "\x1b[2J", [[]], {}, True)
        )
        return [msgpack.packb([version, name, values])]

    def _other_version(self) -> list[bytes]:
        _, name, values = msgpack.unpackb(self._random.choice(VALID))
        return [msgpack.packb([self._random.choice((0, PROTOCOL_VERSION + 1, -1, 2**32)), name, values])]

    def _many_frames(self) -> list[bytes]:
        return [self._random.choice((b"", *VALID)) for _ in range(self._random.randrange(2, 6))]

    def _long(self) -> list[bytes]:
        return [self._random.randbytes(self._random.randrange(1024, MAX_REPORT_BYTES))]


class Listening:
    """A member's listener that minds being told anything untrue."""

    def __init__(self) -> None:
        self.verdict: tuple[str, ...] | None = None
        self.told = threading.Event()
        self.harm: list[object] = []

    def on_lost(self, error: object) -> None:
        self.harm.append(error)

    def on_changed(self, error: object) -> None:
        if str(error) != "all 2 workers have come":
            self.harm.append(error)

    def on_left(self, rank: int, completed: int) -> None:
        if completed != 11:
            self.harm.append((rank, completed))

    def on_inquiry(self, sequence: int) -> str:
        return f"call {sequence}"

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        self.verdict = calls
        self.told.set()


class Ring:
    """A coordinator with a launcher and two workers whose ring has formed."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        key = JobKey.generate()
        self.key_file = str(directory / "job.key")
        key.save(self.key_file)
        timeouts = Timeouts(heartbeat_timeout_s=20.0, inquiry_timeout_s=PATIENCE_S)
        settings = CoordinatorSettings(world_size=2, timeouts=timeouts, min_workers=1)
        self.coordinator = Coordinator(settings, key)
        stack.callback(self.coordinator.close)
        self.coordinator.start()
        launcher = LauncherLink(self.coordinator.address, key, timeouts, lambda message: None)
        stack.callback(launcher.close)
        launcher.register("here", "127.0.0.1", 2, 29500, False)
        self.listeners = [Listening(), Listening()]
        self.links = []
        for worker_id, listener in enumerate(self.listeners):
            env = WorkerEnv(
                coordinator=self.coordinator.address,
                key_file=self.key_file,
                worker_id=worker_id,
                host="here",
                address="127.0.0.1",
                local_rank=worker_id,
                local_world_size=2,
            )
            self.links.append(WorkerLink(env, timeouts, listener))
            stack.callback(self.links[-1].close)
        in_parallel(lambda link: link.join(lambda token, encrypt: "tcp://127.0.0.1:1"), self.links)
        host, _, port = self.coordinator.address.rpartition(":")
        heartbeat_port = self.coordinator._quorum._settings.heartbeat_port
        self.endpoints = (f"tcp://{host}:{port}", f"tcp://{host}:{heartbeat_port}")

    def check_unharmed(self) -> None:
        """It still answers, and leaves in order."""
        assert [listener.harm for listener in self.listeners] == [[], []]
        statistics = self.coordinator.statistics()
        assert (statistics.generation, statistics.members, statistics.launchers) == (1, 2, 1)
        assert statistics.internal_errors == 0
        self.links[0].dispute(3)
        for listener in self.listeners:
            assert listener.told.wait(PATIENCE_S)
            assert listener.verdict == ("call 3", "call 3")
        in_parallel(lambda link: link.leave(11), self.links)
        assert [listener.harm for listener in self.listeners] == [[], []]


def in_parallel(call: Callable[[WorkerLink], object], links: list[WorkerLink]) -> None:
    errors: list[BaseException] = []

    def guarded(link: WorkerLink) -> None:
        try:
            call(link)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(link,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    with ExitStack() as stack:
        yield Ring(stack, tmp_path)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Thrower:
    """A process of its own that runs `throw`, and then keeps its connections until it is told to end.

    (A connection that is closed while answers to it are unread is reset, and takes along what it
    had sent last.)
    """

    def __init__(self, ring: Ring, seed: int, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, ring.key_file, str(seed), str(count), *ring.endpoints],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE_S)


def throw(key: JobKey, seed: int, count: int, endpoints: list[str]) -> None:
    """Throw `count` messages at the endpoints in turn, under a new peer id every so often."""
    garbage = Garbage(seed)
    with zmq.Context() as context:
        dealers = []
        for number, start in enumerate(range(0, count, FRAMES_PER_SOCKET)):
            dealer = context.socket(zmq.DEALER)
            dealer.sndhwm = 256
            dealer.linger = 0
            key.secure_client(dealer)
            dealer.connect(endpoints[number % len(endpoints)])
            dealers.append(dealer)
            for message in garbage.take(min(FRAMES_PER_SOCKET, count - start)):
                dealer.send_multipart(message)
        sys.stdin.read()
        for dealer in dealers:
            dealer.close()


@pytest.mark.timeout(300)
def test_a_million_bad_frames_are_counted_and_do_no_harm(ring: Ring) -> None:
    before_bytes = peak_bytes = rss_bytes()
    throwers = [Thrower(ring, SEED + number, FRAMES // THROWERS) for number in range(THROWERS)]
    pause = threading.Event()
    while sum((refused := ring.coordinator.statistics().refused).values()) < FRAMES:
        peak_bytes = max(peak_bytes, rss_bytes())
        pause.wait(0.1)
    assert [thrower.end() for thrower in throwers] == [0] * THROWERS
    ring.check_unharmed()
    assert ring.coordinator.statistics().refused == refused
    assert sum(refused.values()) == FRAMES
    assert 50 < len(refused) < 1000  # bad in many ways, but not in as many as there are frames
    assert peak_bytes - before_bytes < GROWTH_LIMIT_BYTES


def test_connections_that_break_the_rules_do_no_harm(ring: Ring) -> None:
    """What ZeroMQ itself throws out, and so never comes to be counted."""
    key = JobKey.load(ring.key_file)
    for endpoint in ring.endpoints:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, bytes(64), os.urandom(4096)):
            with socket.create_connection((host, int(port))) as connection:
                throw_bytes(connection, noise)
        with zmq.Context() as context:
            for _ in range(20):  # twins under one peer id
                twin = context.socket(zmq.DEALER)
                twin.routing_id = b"twin"
                key.secure_client(twin)
                twin.connect(endpoint)
                twin.send(VALID[0])
                twin.close(linger=100)
            too_long = context.socket(zmq.DEALER)
            monitor = too_long.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            key.secure_client(too_long)
            too_long.connect(endpoint)
            too_long.send(bytes(MAX_REPORT_BYTES + 1024))
            assert monitor.poll(PATIENCE_S * 1000)
            too_long.disable_monitor()
            monitor.close(linger=0)
            too_long.close(linger=0)
    ring.check_unharmed()


def throw_bytes(connection: socket.socket, noise: bytes) -> None:
    """Send, and wait until the other side hangs up, however it does."""
    connection.settimeout(PATIENCE_S)
    try:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    except TimeoutError:
        raise
    except OSError:
        pass


if __name__ == "__main__":
    throw(JobKey.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
