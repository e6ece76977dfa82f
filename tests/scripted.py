"""A coordinator that says what a test has it say: for what launchers make of its words."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import zmq

from ringps.membership import Assignment, JobKey
from ringps.wire.control import (
    TO_COORDINATOR,
    LauncherHello,
    LauncherLeaving,
    Message,
    Waiting,
    WorkerExited,
    decode,
    encode,
)

Wanted = TypeVar("Wanted", LauncherHello, LauncherLeaving, WorkerExited)

_LIMIT_MS = 20_000


class ScriptedCoordinator:
    """Of one launcher, on loopback. A second one at the same `port` is the first one restarted."""

    def __init__(self, key: JobKey | None = None, port: int | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        if key is not None:
            key.secure_server(self._socket)
        self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.port = int(bound.rstrip(b"\0").rpartition(b":")[2])
        self._peer = b""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def hear(self, kind: type[Wanted]) -> Wanted:
        """The next message, which must be of this kind."""
        assert self._socket.poll(_LIMIT_MS), f"no {kind.__name__} came"
        self._peer, frame = self._socket.recv_multipart()
        message = decode(frame, TO_COORDINATOR)
        assert isinstance(message, kind), message
        return message

    def say(self, message: Message) -> None:
        """Tell the launcher that was heard last."""
        self._socket.send_multipart([self._peer, encode(message)])

    def assign(self, world_size: int, first_worker_id: int = 0) -> LauncherHello:
        """Take the launcher in, as the only one; its hello."""
        hello = self.hear(LauncherHello)
        self.say(Waiting(reason="a moment"))
        self.say(assignment(world_size, first_worker_id))
        return hello

    def __enter__(self) -> ScriptedCoordinator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close(linger=1000)
        self._context.term()


def assignment(world_size: int, first_worker_id: int = 0) -> Assignment:
    """For a launcher that is the only one."""
    return Assignment(
        first_worker_id=first_worker_id,
        world_size=world_size,
        host_index=0,
        host_count=1,
        master_address="127.0.0.1",
        master_port=29500,
        hosts=("here",),
    )
