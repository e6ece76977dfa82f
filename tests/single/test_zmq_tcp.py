"""The ZeroMQ transport's own promises: who may connect, what it refuses, what it says when a link dies."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import zmq
from zmq.utils import garbage

from ringps.collectives import Communicator
from ringps.config import Config
from ringps.errors import PeerLostError, SetupError
from ringps.testing import MemoryRing, run_ring
from ringps.transport.keys import JobKey
from ringps.transport.zap import decide
from ringps.transport.zmq_tcp import ZmqTcpListener, ZmqTcpTransport
from tests.rings import zmq_ring

CONFIG = Config()


def refuse_all(peer: int, header: object) -> None:
    """Takes nothing."""


def wait_until_refused(transport: ZmqTcpTransport, reason: str) -> None:
    for _ in range(2000):
        if transport.statistics().refused.get(reason):
            return
        transport.receive(0, refuse_all)
        transport.wait(0.01, receiving=(), sending=())
    pytest.fail(f"{reason!r} was not counted: {transport.statistics()}")


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("knows", ["nothing", "a guess", "the public half"])
def test_who_does_not_know_the_token_is_refused(encrypt: bool, knows: str) -> None:
    token = JobKey.generate()
    listener = ZmqTcpListener("127.0.0.1", token, CONFIG.exchange, encrypt=encrypt)
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.linger = 0
        stranger.immediate = True
        if knows != "nothing" and encrypt:
            known = token if knows == "the public half" else JobKey.generate()
            stranger.curve_serverkey = known.public
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        elif knows != "nothing":
            stranger.plain_username = b"ringps"
            stranger.plain_password = token.public if knows == "the public half" else b"guess"
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        stranger.connect(listener.address)
        assert monitor.poll(20_000), "the stranger was let in"
        with pytest.raises(zmq.Again):
            stranger.send(b"x", zmq.NOBLOCK)
        stranger.disable_monitor()
        monitor.close(linger=0)
    if knows == "the public half" or (knows == "a guess" and not encrypt):
        assert listener._zap.refused >= 1
    listener.close()


def test_zap_decisions() -> None:
    key = JobKey.generate()
    raw = zmq.utils.z85.decode(key.public)
    start = [b"1.0", b"1", b"ringps-data", b"127.0.0.1", b""]
    assert decide([*start, b"PLAIN", b"ringps", key.secret], key)[0] == b"200"
    assert decide([*start, b"CURVE", raw], key)[0] == b"200"
    for credentials in (
        [b"PLAIN", b"ringps", key.public],
        [b"PLAIN", key.secret],
        [b"CURVE", bytes(32)],
        [b"NULL"],
        [b"GSSAPI", b"x"],
        [],
    ):
        assert decide([*start, *credentials], key)[0] in (b"400", b"500")
    assert decide([b"2.0", *start[1:], b"CURVE", raw], key)[0] == b"500"
    assert decide([], key)[0] == b"500"


def test_messages_that_are_no_frames_are_refused_and_counted() -> None:
    ring = zmq_ring(2, CONFIG)
    sender, receiver = ring[0], ring[1]
    sender._push.send(b"alone")
    sender._push.send_multipart([b"one", b"two", b"three", b"four"])
    wait_until_refused(receiver, "message without payload")
    wait_until_refused(receiver, "message of more than two parts")
    for transport in ring:
        transport.close()


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_message_above_the_limit_ends_the_connection_and_not_the_receiver(encrypt: bool) -> None:
    ring = zmq_ring(2, CONFIG, encrypt=encrypt)
    sender = ring[0]
    sender._push.send_multipart([b"h", bytes(CONFIG.exchange.chunk_bytes + 4096)])
    with pytest.raises(PeerLostError, match="connection closed"):
        sender.wait(20, receiving=(), sending=())
    assert ring[1].receive(0, refuse_all) is None
    for transport in ring:
        transport.close()


def test_a_closed_link_is_a_lost_peer_that_is_named() -> None:
    ring = zmq_ring(3, CONFIG)
    with MemoryRing(3, CONFIG, transports=ring) as memory:
        warm = [comm.all_reduce(torch.ones(3), async_op=True) for comm in memory.communicators]
        for handle in warm:
            handle.wait(20)
        handle = memory.communicators[0].all_reduce(torch.ones(3), async_op=True)
        memory._backends[1].close()
        with pytest.raises(PeerLostError, match=r"rank 1 \(worker 1 on here\) lost: .* connection closed"):
            handle.wait(20)


def test_ranks_that_are_threads_share_what_pyzmq_lets_buffers_go_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    garbage.gc.stop()  # it begins anew when it is needed
    made: list[object] = []
    together = threading.Barrier(2)
    make = zmq.Context.socket

    def socket(self: zmq.Context[zmq.Socket[bytes]], kind: int, **options: object) -> zmq.Socket[bytes]:
        if kind == zmq.PUSH and self is garbage.gc.context:
            made.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.2)  # for another thread that has come to make one
        return make(self, kind, **options)

    monkeypatch.setattr(zmq.Context, "socket", socket)

    def work(ring: Communicator) -> None:
        ring.all_reduce(torch.ones(300_000))

    run_ring(3, work, CONFIG, transports=zmq_ring(3, CONFIG))
    assert len(made) == 1


def test_an_address_of_another_machine_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match=r"cannot listen on 203\.0\.113\.1"):
        ZmqTcpListener("203.0.113.1", JobKey.generate(), CONFIG.exchange, encrypt=False)


def test_ipv6_loopback() -> None:
    listener = ZmqTcpListener("::1", JobKey.generate(), CONFIG.exchange, encrypt=False)
    assert listener.address.startswith("tcp://[::1]:")
    listener.close()


def test_a_keys_secret_half_never_shows() -> None:
    key = JobKey.generate()
    assert key.secret.decode() not in repr(key)
