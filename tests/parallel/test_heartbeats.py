"""Where a worker's heartbeats go when its coordinator moves."""

from __future__ import annotations

from typing import Any

import zmq

from ringps.config import Timeouts
from ringps.errors import CoordinatorUnreachableError
from ringps.membership.channel import ControlChannel
from ringps.wire.control import HEARTBEATS, TO_WORKER, Beat, Hello, Welcome, decode, encode

TIMEOUTS = Timeouts(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.5)
SESSION = "0" * 32
_LIMIT_MS = 20_000


class Beating:
    """Sends heartbeats to wherever it is welcomed."""

    channel: ControlChannel

    def on_message(self, message: Any) -> None:
        self.channel.start_heartbeat(message.heartbeat_port, beat)

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        raise AssertionError(error)


def beat(count: int) -> Beat:
    return Beat(session=SESSION, worker_id=0, generation=1, step=count, count=count)


def test_heartbeats_follow_the_connection() -> None:
    """The first coordinator's machine is gone without a word: the connection there has not ended."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as control:
        port = control.bind_to_random_port("tcp://127.0.0.1")
        handler = Beating()
        handler.channel = ControlChannel(f"127.0.0.1:{port}", None, TIMEOUTS, TO_WORKER, handler)
        with context.socket(zmq.ROUTER) as first, context.socket(zmq.ROUTER) as second:
            try:
                handler.channel.open(hello())
                assert control.poll(_LIMIT_MS)
                peer, _ = control.recv_multipart()
                counts = []
                for heart in (first, second):
                    heart_port = heart.bind_to_random_port("tcp://127.0.0.1")
                    welcome = Welcome(heartbeat_port=heart_port, elastic=True, running=0)
                    control.send_multipart([peer, encode(welcome)])
                    assert heart.poll(_LIMIT_MS), "no heartbeat came"
                    counts.append(decode(heart.recv_multipart()[1], HEARTBEATS).count)
                assert counts[0] < counts[1], "or they would be taken for old ones"
            finally:
                handler.channel.close(linger_s=0.0)


def hello() -> Hello:
    return Hello(worker_id=0, host="h", pid=1, generation=0, members=(), program="", session=SESSION)
