"""Training state from peers: who is served, what is fetched, and what happens when something fails."""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringps import probe
from ringps.checkpoint import dtypes, peer_wire, pieces, serving, tree
from ringps.checkpoint.peer import Fetched, fetch
from ringps.checkpoint.peer_wire import Kind, Request, Summary
from ringps.checkpoint.shares import MOST_TRIES, Shares
from ringps.checkpoint.state_server import StateServer
from ringps.checkpoint.tree import State
from ringps.config import Timeouts
from ringps.errors import ClosedError, DivergedError, FrameError, SetupError
from ringps.transport.keys import JobKey
from tests.leftovers import no_leftovers  # noqa: F401

TOKEN = JobKey.generate()
STEP = 7
PIECE_BYTES = 1 << 16
TIMEOUTS = Timeouts(connect_timeout_s=20, silent_link_s=20)
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)


def state(numel: int = 300_000, seed: int = 0, **more: Any) -> State:
    """A state of a dozen or more pieces."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-(2**31), 2**31 - 1, (numel,), generator=generator, dtype=torch.int32)
    return tree.flatten({"weights": weights, "bias": weights[:1000].double(), **more})


SAMPLE = state(step=STEP)
PIECES = 19


class Servers(ExitStack):
    """State servers that are closed when the test ends."""

    def __init__(self) -> None:
        super().__init__()
        self.servers: list[StateServer] = []

    def serving(self, *states: State, step: int = STEP, token: JobKey = TOKEN) -> list[str]:
        """More servers; the addresses of all."""
        for one in states:
            server = self.enter_context(closing(StateServer("127.0.0.1", token)))
            server.offer(*one, step)
            self.servers.append(server)
        return [server.address for server in self.servers]


@pytest.fixture
def servers() -> Iterator[Servers]:
    with Servers() as opened:
        yield opened


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Has a function called with every piece that is about to be fetched."""

    def listen(reached: Callable[[int], None]) -> None:
        def heard(point: str, passed: dict[str, Any]) -> None:
            assert point == "fetch"
            reached(passed["piece"])

        monkeypatch.setattr(probe, "listener", heard)

    return listen


def get(addresses: Sequence[str], own: State | None = None, **more: Any) -> Fetched:
    return fetch(addresses, **{"token": TOKEN, "step": STEP, "own": own, "timeouts": TIMEOUTS, **more})


def assert_is(fetched: Fetched, expected: State) -> None:
    assert fetched.skeleton == expected.skeleton
    assert len(fetched.tensors) == len(expected.tensors)
    for one, other in zip(fetched.tensors, expected.tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(bits(one), bits(other))
        assert one.numel() == 0 or one.data_ptr() != other.data_ptr()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def total_bytes(of: State) -> int:
    return pieces.Pieces(of.tensors).layout.total_bytes


# What is fetched.


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_state_comes_from_all_servers(servers: Servers, listener: Any, count: int) -> None:
    assert pieces.Pieces(SAMPLE.tensors).layout.piece_count == PIECES
    addresses = servers.serving(*[SAMPLE] * count)
    all_here = threading.Barrier(count)
    first = threading.local()

    def reached(piece: int) -> None:
        if not hasattr(first, "piece"):
            first.piece = piece
            all_here.wait(PATIENCE_S)

    listener(reached)
    fetched = get(addresses)
    assert_is(fetched, SAMPLE)
    assert (fetched.bytes_fetched, fetched.bytes_skipped) == (total_bytes(SAMPLE), 0)
    assert (fetched.pieces_refetched, dict(fetched.lost)) == (0, {})
    assert 0 < fetched.agreeing_s <= fetched.seconds
    sent = [server.statistics().pieces_sent for server in servers.servers]
    assert sum(sent) == PIECES and all(sent)
    assert tree.unflatten(fetched.skeleton, fetched.tensors)["step"] == STEP


@pytest.mark.filterwarnings("ignore:.*support is experimental")
def test_tensors_of_all_dtypes_and_none(servers: Servers) -> None:
    raw = torch.arange(0, 2**18, dtype=torch.int32).view(torch.uint8)
    tensors = {
        name: (raw % 2 if dtype is torch.bool else raw)[: 5 * dtype.itemsize].clone().view(dtype)
        for name, dtype in dtypes.BY_NAME.items()
    }
    everything = tree.flatten(
        [tensors, torch.tensor(3.0), torch.empty(0, 5), raw, torch.empty(0), torch.ones(3, 4).T]
    )
    assert_is(get(servers.serving(everything, everything)), everything)


@pytest.mark.parametrize("value", [{"a": 1}, [torch.empty(0)]], ids=["no tensors", "an empty tensor"])
def test_a_state_without_bytes(servers: Servers, value: Any) -> None:
    empty = tree.flatten(value)
    fetched = get(servers.serving(empty, empty), own=empty)
    assert_is(fetched, empty)
    assert (fetched.bytes_fetched, fetched.bytes_skipped) == (0, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_the_same_here_is_not_fetched(servers: Servers, listener: Any, count: int) -> None:
    addresses = servers.serving(*[SAMPLE] * count)
    own = state(step="another")
    own.tensors[0][PIECE_BYTES // 4 * 3] += 1  # the first element of piece 3
    before = own.tensors[0].clone()
    asked: list[int] = []
    listener(asked.append)
    fetched = get(addresses, own)
    assert asked == [3]
    assert_is(fetched, SAMPLE)
    assert fetched.bytes_fetched == PIECE_BYTES
    assert fetched.bytes_skipped == total_bytes(SAMPLE) - PIECE_BYTES
    assert torch.equal(own.tensors[0], before)


def test_a_state_of_another_layout_is_of_no_use(servers: Servers) -> None:
    fetched = get(servers.serving(SAMPLE), own=state(numel=299_999))
    assert_is(fetched, SAMPLE)
    assert fetched.bytes_skipped == 0


def test_another_offer_takes_the_place_of_the_first(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    assert_is(get(addresses), SAMPLE)
    later = state(seed=1)
    servers.servers[0].offer(*later, STEP + 1)
    assert_is(get(addresses, step=STEP + 1), later)


def test_an_offer_is_served_live(servers: Servers) -> None:
    mine = state()
    addresses = servers.serving(mine)
    mine.tensors[0].fill_(5)
    assert_is(get(addresses), mine)


# Servers that fail.


@pytest.mark.parametrize("end", [StateServer.close, StateServer.withdraw])
def test_a_server_that_dies_midway_is_done_without(servers: Servers, listener: Any, end: Any) -> None:
    addresses = servers.serving(SAMPLE, SAMPLE, SAMPLE)
    ended, all_here, mine = threading.Event(), threading.Barrier(3), threading.local()

    def reached(piece: int) -> None:
        if not hasattr(mine, "pieces"):
            mine.pieces = []
            all_here.wait(PATIENCE_S)
        mine.pieces.append(piece)
        if mine.pieces == [1, 4, 7]:  # server 1's, and the first of them has come
            end(servers.servers[1])
            ended.set()
        elif len(mine.pieces) > 1 and mine.pieces[0] != 1:
            ended.wait(PATIENCE_S)

    listener(reached)
    fetched = get(addresses)
    assert_is(fetched, SAMPLE)
    assert list(fetched.lost) == [addresses[1]]
    assert servers.servers[1].statistics().pieces_sent > 0


def test_when_no_server_is_left_each_is_named(servers: Servers, listener: Any) -> None:
    addresses = servers.serving(SAMPLE, SAMPLE)
    listener(lambda piece: [server.close() for server in servers.servers] if piece == 9 else None)
    with pytest.raises(SetupError, match=r"^no server is left to get the training state from") as caught:
        get(addresses)
    assert all(f"{address}: it" in str(caught.value) for address in addresses)


def test_servers_that_do_not_answer_are_done_without(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    servers.serving(SAMPLE, step=STEP + 1)
    servers.serving(SAMPLE, token=JobKey.generate())
    addresses = [address, *servers.serving(SAMPLE, SAMPLE)]
    fetched = get(addresses)
    assert_is(fetched, SAMPLE)
    assert fetched.lost == {
        addresses[0]: "cannot connect to it (Connection refused)",
        addresses[1]: "it serves the state of step 8, not of step 7",
        addresses[2]: "it does not know this generation's token",
    }


def test_a_server_without_an_offer_says_so(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    servers.servers[0].withdraw()
    with pytest.raises(SetupError, match=f"{addresses[0]}: it does not offer its state now"):
        get(addresses)


def test_another_token_is_of_no_use(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    with pytest.raises(SetupError, match="it does not know this generation's token"):
        get(addresses, token=JobKey.generate())
    assert servers.servers[0].statistics().bytes_sent == 0


def test_servers_must_hold_the_same_bits(servers: Servers) -> None:
    other = state(step=STEP)
    other.tensors[0][PIECE_BYTES // 4 * 5 + 2] ^= 1
    addresses = servers.serving(SAMPLE, SAMPLE, other)
    with pytest.raises(DivergedError, match=r"serve different bits .* piece 5 \(tensor 0\)") as caught:
        get(addresses)
    assert addresses[2] in str(caught.value) and addresses[1] in str(caught.value)


def test_servers_must_hold_the_same_values(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE, state(step="another"), SAMPLE)
    with pytest.raises(DivergedError, match="differ in their structure or plain values") as caught:
        get(addresses)
    assert f"One: {addresses[0]} and {addresses[2]}; another: {addresses[1]}" in str(caught.value)


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ([], "servers is empty"),
        (["127.0.0.1:5", "nowhere"], "'nowhere' is not HOST:PORT"),
        ([":5"], "':5' is"),
    ],
)
def test_arguments_that_make_no_sense(addresses: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(addresses)


def test_state_that_changes_while_it_is_served_is_not_taken(servers: Servers, listener: Any) -> None:
    mine = state()
    addresses = servers.serving(mine)

    def reached(piece: int) -> None:
        if piece == 6:
            mine.tensors[0][PIECE_BYTES // 4 * 6 : PIECE_BYTES // 4 * 7] += 1

    listener(reached)
    with pytest.raises(
        SetupError, match=r"cannot get piece 6 \(tensor 0\): it came with a wrong hash 4 times"
    ):
        get(addresses)


# Between the two.


class Proxy:
    """Stands before a server for one client, and alters the bytes at `at` of what it sends."""

    def __init__(self, address: str, at: Sequence[int]) -> None:
        host, port = address.split(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._at = at
        self._upstream = socket.create_connection((host, int(port)))
        self.altered = 0
        self._threads = [threading.Thread(target=self._forth), threading.Thread(target=self._back)]
        self._accepted: socket.socket | None = None
        self._ready = threading.Event()
        for thread in self._threads:
            thread.start()

    def _forth(self) -> None:
        self._accepted, _ = self._listening.accept()
        self._ready.set()
        self._pump(self._accepted, self._upstream, ())

    def _back(self) -> None:
        self._ready.wait(PATIENCE_S)
        assert self._accepted is not None
        self._pump(self._upstream, self._accepted, self._at)

    def _pump(self, source: socket.socket, sink: socket.socket, at: Sequence[int]) -> None:
        passed = 0
        try:
            while came := bytearray(source.recv(1 << 16)):
                for place in at:
                    if passed <= place < passed + len(came):
                        came[place - passed] ^= 1
                        self.altered += 1
                passed += len(came)
                sink.sendall(came)
        except OSError:
            pass  # one of the two is gone
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for one in (self._listening, self._upstream, self._accepted):
            assert one is not None
            one.close()


def bytes_before_pieces(count: int, described: bool) -> int:
    """What a server sends before the first piece, to one of `count` servers' client."""
    hashes = PIECES if count == 1 else len(range(0, PIECES, count)) + len(range(1, PIECES, count))
    description = len(SAMPLE.skeleton) + len(pieces.Pieces(SAMPLE.tensors).layout.encode())
    return (
        peer_wire.CHALLENGE_BYTES
        + 1
        + peer_wire.SUMMARY_BYTES
        + described * description
        + pieces.DIGEST_BYTES * hashes
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_byte_altered_on_the_way_costs_one_piece(servers: Servers, count: int) -> None:
    addresses = servers.serving(*[SAMPLE] * count)
    with closing(Proxy(addresses[0], [bytes_before_pieces(count, True) + 100])) as proxy:
        fetched = get([proxy.address, *addresses[1:]])
    assert proxy.altered == 1
    assert_is(fetched, SAMPLE)
    assert fetched.pieces_refetched == 1
    assert (fetched.bytes_fetched, dict(fetched.lost)) == (total_bytes(SAMPLE), {})
    sent = sum(server.statistics().pieces_sent for server in servers.servers)
    assert sent == PIECES + 1  # the wrong one twice


@pytest.mark.parametrize(
    "back", [pieces.DIGEST_BYTES * PIECES + 3, 40], ids=["description", "hash that two servers give"]
)
def test_bytes_altered_on_the_way_before_the_first_piece(servers: Servers, back: int) -> None:
    addresses = servers.serving(SAMPLE, SAMPLE)
    with closing(Proxy(addresses[0], [bytes_before_pieces(2, True) - back])) as proxy:
        fetched = get([proxy.address, addresses[1]])
    assert proxy.altered == 1
    assert_is(fetched, SAMPLE)


# The calling thread.


class Stop(Exception):
    pass


def test_what_check_raises_ends_the_fetch(servers: Servers, listener: Any) -> None:
    addresses = servers.serving(SAMPLE, SAMPLE)
    reached, go_on = threading.Event(), threading.Event()

    def hold(piece: int) -> None:
        reached.set()
        go_on.wait(PATIENCE_S)

    def check() -> None:
        if reached.is_set():
            go_on.set()
            raise Stop

    listener(hold)
    with pytest.raises(Stop):
        get(addresses, check=check)


def test_check_ends_a_fetch_that_hangs() -> None:
    """The first server takes no connection, the second says nothing."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname()),
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        calls = iter(range(3))

        def check() -> None:
            if next(calls, None) is None:
                raise Stop

        began_s = time.monotonic()
        with pytest.raises(Stop):
            get([f"127.0.0.1:{one.getsockname()[1]}" for one in (full, silent)], check=check)
        assert time.monotonic() - began_s < TIMEOUTS.connect_timeout_s / 2


def test_a_fetch_takes_no_longer_than_allowed(servers: Servers, listener: Any) -> None:
    over = threading.Event()
    addresses = servers.serving(SAMPLE, SAMPLE)
    listener(lambda piece: over.wait(PATIENCE_S))
    timer = threading.Timer(0.5, over.set)
    timer.start()
    with pytest.raises(SetupError, match="did not come from its servers in time; raise feed_timeout_s"):
        get(addresses, timeouts=Timeouts(feed_timeout_s=0.2))
    timer.join()


class Impostor:
    """A server by hand: knows the token, and sends `raw` when it should answer requests."""

    def __init__(self, raw: bytes, *, then_closes: bool) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._raw = raw
        self._closes = then_closes
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            hello = connection.recv(peer_wire.HELLO_BYTES, socket.MSG_WAITALL)
            connection.sendall(peer_wire.challenge(TOKEN.secret, hello, bytes(peer_wire.NONCE_BYTES)))
            connection.recv(peer_wire.PROOF_BYTES, socket.MSG_WAITALL)
            try:
                connection.sendall(bytes([peer_wire.Greeting.WELCOME]) + self._raw)
                if self._closes:
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass  # until the client goes
            except OSError:
                pass

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        self._listening.close()


def test_a_silent_server_is_done_without(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    with closing(Impostor(b"", then_closes=False)) as silent:
        fetched = get([silent.address, *addresses], timeouts=Timeouts(silent_link_s=1))
    assert_is(fetched, SAMPLE)
    assert fetched.lost == {silent.address: "it was silent for 1 s"}


@pytest.mark.parametrize("first", [True, False], ids=["describes the state", "is asked for hashes"])
def test_a_server_that_dies_before_the_first_piece_is_done_without(servers: Servers, first: bool) -> None:
    addresses = servers.serving(SAMPLE, SAMPLE)
    layout = pieces.Pieces(SAMPLE.tensors).layout.encode()
    whole = pieces.digest([memoryview(SAMPLE.skeleton), memoryview(layout)])
    summary = peer_wire.encode_summary(Summary(STEP, len(SAMPLE.skeleton), len(layout), whole))
    with closing(Impostor(summary + b"a few more bytes", then_closes=True)) as dying:
        fetched = get([dying.address, *addresses] if first else [*addresses, dying.address])
    assert_is(fetched, SAMPLE)
    assert fetched.lost == {dying.address: "it closed the connection"}


DESCRIPTION = tree.flatten([1]).skeleton + b"\xc1"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "it closed the connection"),
        (
            peer_wire.encode_summary(Summary(STEP, 2**62, 1, bytes(16))),
            r"it does not follow the protocol \(state description too long\)",
        ),
        (
            peer_wire.encode_summary(Summary(STEP, 3, 1, bytes(16))) + b"abcd" * MOST_TRIES,
            "description does not come with the hash that it should have",
        ),
        (
            peer_wire.encode_summary(
                Summary(STEP, len(DESCRIPTION) - 1, 1, pieces.digest([memoryview(DESCRIPTION)]))
            )
            + DESCRIPTION,
            r"it does not follow the protocol \(layout: not msgpack\)",
        ),
    ],
    ids=["nothing", "too long", "wrong hash", "no layout"],
)
def test_a_server_that_talks_nonsense(raw: bytes, reason: str) -> None:
    with (
        closing(Impostor(raw, then_closes=True)) as impostor,
        pytest.raises(SetupError, match=f"{impostor.address}: .*{reason}"),
    ):
        get([impostor.address])


@settings(max_examples=30)
@given(st.binary(max_size=400))
def test_any_bytes_from_a_server_are_an_error_that_names_it(raw: bytes) -> None:
    with (
        closing(Impostor(raw, then_closes=True)) as impostor,
        pytest.raises(SetupError, match=impostor.address),
    ):
        get([impostor.address])


# The server alone.


class Client:
    """A client by hand."""

    def __init__(self, address: str, token: JobKey = TOKEN) -> None:
        host, port = address.split(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(PATIENCE_S)
        self.hello = peer_wire.hello(bytes(peer_wire.NONCE_BYTES))
        self.token = token

    def meet(self) -> int:
        """The last byte of the handshake."""
        self.socket.sendall(self.hello)
        challenge = self.read(peer_wire.CHALLENGE_BYTES)
        self.socket.sendall(peer_wire.answer(self.token.secret, self.hello, challenge))
        return self.read(1)[0]

    def ask(self, *requests: Request) -> None:
        self.socket.sendall(b"".join(map(peer_wire.encode_request, requests)))

    def read(self, size_bytes: int) -> bytes:
        return self.socket.recv(size_bytes, socket.MSG_WAITALL)

    def closed(self) -> bool:
        """Whether the server closes the connection, whatever it still sends."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


def eventually(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "did not happen"
        threading.Event().wait(0.002)


def test_strangers_block_nobody_and_are_counted(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    server = servers.servers[0]
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(Client(addresses[0]))) for _ in range(serving.BACKLOG + 6)]
        garbage = [stack.enter_context(closing(Client(addresses[0]))) for _ in range(10)]
        for one in garbage:
            one.socket.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
            assert one.closed()
        guess = stack.enter_context(closing(Client(addresses[0])))
        guess.socket.sendall(guess.hello + bytes(peer_wire.PROOF_BYTES))
        assert guess.closed()
        assert_is(get(addresses), SAMPLE)
        assert all(one.closed() for one in silent[:6])
    assert server.statistics().refused["connection that does not say hello"] == 10
    assert server.statistics().refused["connection without the token"] == 1
    assert server.statistics().refused["more connections than can be waited for"] >= 6


def test_strangers_may_not_stay(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_PATIENCE_S", 0.05)
    addresses = servers.serving(SAMPLE)
    with closing(Client(addresses[0])) as client:
        assert client.closed()
    refused = servers.servers[0].statistics().refused
    assert refused == {"connection that took too long to prove itself": 1}


def test_so_many_clients_and_no_more(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(addresses[0]))) for _ in range(serving.MOST_CLIENTS)]
        assert {client.meet() for client in clients} == {peer_wire.Greeting.WELCOME}
        with pytest.raises(SetupError, match="it serves as many others as it can"):
            get(addresses)
        clients[0].close()
        eventually(lambda: try_to_meet(addresses[0]))


def try_to_meet(address: str) -> bool:
    with closing(Client(address)) as client:
        return client.meet() == peer_wire.Greeting.WELCOME


def test_a_proof_is_of_no_use_again(servers: Servers) -> None:
    addresses = servers.serving(SAMPLE)
    with closing(Client(addresses[0])) as client, closing(Client(addresses[0])) as thief:
        client.socket.sendall(client.hello)
        proof = peer_wire.answer(TOKEN.secret, client.hello, client.read(peer_wire.CHALLENGE_BYTES))
        thief.socket.sendall(client.hello + proof)
        thief.read(peer_wire.CHALLENGE_BYTES)
        assert thief.closed()


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack("<BQQ", 0, 0, 1),
        struct.pack("<BQQ", 5, 0, 1),
        struct.pack("<BQQ", Kind.PIECE, PIECES, 1),
        struct.pack("<BQQ", Kind.PIECE, 2**64 - 1, 1),
        struct.pack("<BQQ", Kind.HASHES, 0, 0),
    ],
    ids=["kind 0", "kind 5", "no piece", "far piece", "stride 0"],
)
def test_requests_that_make_no_sense_end_the_connection(servers: Servers, request_bytes: bytes) -> None:
    addresses = servers.serving(SAMPLE)
    with closing(Client(addresses[0])) as client:
        client.meet()
        client.socket.sendall(request_bytes)
        assert client.closed()
    assert sum(servers.servers[0].statistics().refused.values()) == 1
    assert_is(get(addresses), SAMPLE)


@settings(max_examples=50)
@given(raw=st.binary(max_size=300), authenticated=st.booleans())
def test_any_bytes_leave_the_server_in_order(raw: bytes, authenticated: bool) -> None:
    server = shared_server()
    with closing(Client(server.address)) as client:
        if authenticated:
            assert client.meet() == peer_wire.Greeting.WELCOME
        try:
            client.socket.sendall(raw)
            client.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has seen enough already
        assert client.closed()
    with closing(Client(server.address)) as client:
        assert client.meet() == peer_wire.Greeting.WELCOME
        client.ask(Request(Kind.SKELETON))
        assert client.read(len(SAMPLE.skeleton)) == SAMPLE.skeleton


SHARED: list[StateServer] = []


def shared_server() -> StateServer:
    """One for all examples of a property."""
    if not SHARED:
        SHARED.append(StateServer("127.0.0.1", TOKEN))
        SHARED[0].offer(*SAMPLE, STEP)
    return SHARED[0]


@pytest.fixture(autouse=True)
def close_shared_server(no_leftovers: None) -> Iterator[None]:  # noqa: F811
    yield
    while SHARED:
        SHARED.pop().close()


def test_withdraw_ends_a_transfer_at_once() -> None:
    with closing(StateServer("127.0.0.1", TOKEN)) as server:
        large = tree.flatten(torch.ones(2**24))
        server.offer(*large, STEP)
        with closing(Client(server.address)) as client:
            client.meet()
            # Far more than the system holds for a client that does not read.
            client.ask(*[Request(Kind.PIECE, piece) for piece in range(1000)])
            eventually(lambda: server.statistics().pieces_sent > 3)
            began_s = time.monotonic()
            server.withdraw()
            assert time.monotonic() - began_s < 1
            sent = server.statistics().bytes_sent
            assert client.closed()
            assert server.statistics().bytes_sent == sent
        server.withdraw()
        server.offer(*SAMPLE, STEP)
        assert_is(get([server.address]), SAMPLE)


def test_after_withdraw_nothing_holds_the_tensors(servers: Servers) -> None:
    mine = state()
    held = weakref.ref(mine.tensors[0])
    addresses = servers.serving(mine)
    with closing(Client(addresses[0])) as client:
        client.meet()
        client.ask(Request(Kind.PIECE, 0))
        client.read(PIECE_BYTES)
        servers.servers[0].withdraw()
        del mine
        gc.collect()
        assert held() is None


def test_a_closed_server_is_gone() -> None:
    before = set(threading.enumerate())
    server = StateServer("127.0.0.1", TOKEN)
    server.offer(*SAMPLE, STEP)
    with closing(Client(server.address)) as client:
        client.meet()
        (thread,) = set(threading.enumerate()) - before
        assert thread.name == "ringps-state"
        server.close()
        server.close()
        server.withdraw()
        assert client.closed()
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        Client(server.address)
    with pytest.raises(ClosedError, match="this state server was closed"):
        server.offer(*SAMPLE, STEP)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1 to serve the training state: "):
        StateServer("192.0.2.1", TOKEN)


def test_tensors_that_flatten_did_not_give(servers: Servers) -> None:
    servers.serving(SAMPLE)
    with pytest.raises(ValueError, match=r"tensor 0 .* is not a contiguous one"):
        servers.servers[0].offer(b"", [torch.ones(2, 3).T], STEP)


# Who is asked for what.


def test_each_begins_with_its_share_and_then_helps_the_slowest() -> None:
    shares = Shares(range(7), 3)
    assert [shares.take(1), shares.take(1)] == [1, 4]
    assert shares.take(1) == 6  # the end of server 0's share, the longest
    assert [shares.take(0), shares.take(2), shares.take(0), shares.take(0)] == [0, 2, 3, 5]
    assert shares.take(0) is None and not shares.finished
    for piece in range(7):
        shares.came(piece)
    assert shares.finished


def test_what_a_lost_server_owes_is_asked_from_another() -> None:
    shares = Shares(range(4), 2)
    assert [shares.take(0), shares.take(0)] == [0, 2]
    shares.came(0)
    shares.lost(0)
    assert [shares.take(1) for _ in range(4)] == [2, 1, 3, None]


def test_what_came_wrong_is_asked_from_another_first() -> None:
    shares = Shares([0], 2)
    assert shares.take(0) == 0
    again, reason = shares.came_wrong(0)
    assert again and "1 of at most 4" in reason
    assert shares.take(0) is None
    assert shares.take(1) == 0
    assert shares.came_wrong(0)[0]
    assert shares.take(0) == 0  # both sent it wrong
    assert shares.came_wrong(0)[0]
    shares.lost(0)
    assert shares.take(1) == 0
    assert not shares.came_wrong(0)[0]


EVENTS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["take", "came", "wrong", "lost"])))


@given(EVENTS, st.integers(1, 4), st.sets(st.integers(0, 30), max_size=12))
def test_every_piece_comes_once_whatever_fails(
    events: list[tuple[int, str]], count: int, wanted: set[int]
) -> None:
    shares, came, wrong = Shares(wanted, count), [], 0
    under_way: dict[int, list[int]] = {server: [] for server in range(count)}

    def take(server: int) -> None:
        if (piece := shares.take(server)) is not None:
            under_way[server].append(piece)

    def receive(server: int) -> None:
        for piece in under_way[server]:
            came.append(piece)
            shares.came(piece)
        under_way[server] = []

    for number, what in events:
        server = number % count
        if server not in under_way:
            continue
        if what == "take":
            take(server)
        elif what == "came":
            receive(server)
        elif what == "wrong" and under_way[server] and wrong < MOST_TRIES - 1:
            wrong += 1
            assert shares.came_wrong(under_way[server].pop(0))[0]
        elif what == "lost" and len(under_way) > 1:
            del under_way[server]
            shares.lost(server)
    for _ in range(len(wanted) + 1):
        for server in under_way:
            take(server)
            receive(server)
    assert shares.finished
    assert sorted(came) == sorted(wanted)


def test_requests_and_summaries_come_back() -> None:
    request = Request(Kind.HASHES, 3, 2)
    assert peer_wire.decode_request(peer_wire.encode_request(request), 0) == request
    summary = Summary(2**53, 5, 6, bytes(range(16)))
    assert peer_wire.decode_summary(peer_wire.encode_summary(summary)) == summary
    with pytest.raises(FrameError, match="does not say hello"):
        peer_wire.check_hello(bytes(peer_wire.HELLO_BYTES))
