"""Links and a coordinator over real sockets, on threads of one process."""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from ringps.config import Timeouts
from ringps.errors import (
    AddressInUseError,
    AuthenticationError,
    ClosedError,
    CoordinatorUnreachableError,
    PeerLostError,
    RefusedError,
    RingChangedError,
    SetupError,
)
from ringps.membership import (
    Assignment,
    Coordinator,
    CoordinatorLost,
    CoordinatorSettings,
    JobDone,
    JobEvent,
    JobFailed,
    JobKey,
    LauncherLink,
    WorkerLink,
)
from ringps.ring.topology import Generation
from ringps.wire.control import TO_WORKER, Beat, Hello, Lost, Prepare, Refused, Welcome, decode, encode
from ringps.worker_env import WorkerEnv

T = TypeVar("T")
PATIENCE_S = 30.0
SESSION = "0123456789abcdef" * 2
TIMEOUTS = Timeouts(
    connect_timeout_s=20.0,
    rendezvous_timeout_s=20.0,
    heartbeat_interval_s=0.05,
    heartbeat_timeout_s=3.0,
    inquiry_timeout_s=10.0,
    shutdown_timeout_s=20.0,
)


class Ear:
    """A listener that notes what it hears."""

    def __init__(self) -> None:
        self._heard: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.answer: Callable[[int], str] = lambda sequence: f"call {sequence}"

    def on_lost(self, error: PeerLostError) -> None:
        self._heard.put(("lost", error))

    def on_changed(self, error: RingChangedError) -> None:
        """The ring is fixed, so that this is its first formation."""

    def on_left(self, rank: int, completed: int) -> None:
        self._heard.put(("left", rank, completed))

    def on_inquiry(self, sequence: int) -> str:
        return self.answer(sequence)

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        self._heard.put(("verdict", sequence, calls))

    def next(self) -> tuple[Any, ...]:
        return self._heard.get(timeout=PATIENCE_S)


class Site:
    """A coordinator, and what it takes to talk to it. `stack` closes everything."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.stack = stack
        self.directory = directory
        self.key: JobKey | None = JobKey.generate()
        self.pool = stack.enter_context(ThreadPoolExecutor(16, thread_name_prefix="test"))
        self.events: list[dict[str, Any]] = []

    def serve(
        self, world_size: int | None = 2, *, timeouts: Timeouts = TIMEOUTS, **settings: Any
    ) -> Coordinator:
        coordinator = Coordinator(
            CoordinatorSettings(world_size=world_size, timeouts=timeouts, **settings),
            self.key,
            self.events.append,
        )
        self.stack.callback(coordinator.close)
        coordinator.start()
        self.address = coordinator.address
        return coordinator

    def key_file(self, key: JobKey | None) -> str | None:
        if key is None:
            return None
        path = self.directory / f"{key.public.hex()}.key"
        if not path.exists():
            key.save(path)
        return str(path)

    def worker(
        self, worker_id: int, ear: Ear | None = None, *, timeouts: Timeouts = TIMEOUTS, **env: Any
    ) -> WorkerLink:
        contract = WorkerEnv(
            coordinator=self.address,
            key_file=self.key_file(self.key),
            worker_id=worker_id,
            host="here",
            address="127.0.0.1",
            local_rank=worker_id,
            local_world_size=1,
        )
        link = WorkerLink(replace(contract, **env), timeouts, ear or Ear())
        self.stack.callback(link.close)
        return link

    def launcher(
        self, on_message: Callable[[Any], None] = print, *, timeouts: Timeouts = TIMEOUTS
    ) -> LauncherLink:
        link = LauncherLink(self.address, self.key, timeouts, on_message)
        self.stack.callback(link.close)
        return link

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        return self.pool.submit(call, *arguments)

    def join(self, *links: WorkerLink) -> list[Generation]:
        """All links join at the same time."""
        joining = [self.submit(link.join, bind_to(rank)) for rank, link in enumerate(links)]
        return [future.result(PATIENCE_S) for future in joining]


def bind_to(rank: int) -> Callable[[JobKey, bool], str]:
    return lambda token, encrypt: f"tcp://127.0.0.1:{rank + 1}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, tmp_path)


class Stranger:
    """A bare pair of sockets that holds the job key, to say what no link would say."""

    def __init__(self, site: Site) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = site.stack.enter_context(zmq.Context())
        self._key = site.key
        self.control = self._socket()
        self.control.connect(f"tcp://{site.address}")
        self.heartbeat = self._socket()
        self._host = site.address.rpartition(":")[0]
        site.stack.callback(self.close)

    def _socket(self) -> zmq.Socket[bytes]:
        made = self._context.socket(zmq.DEALER)
        made.linger = 0
        made.rcvtimeo = int(PATIENCE_S * 1000)
        if self._key is not None:
            self._key.secure_client(made)
        return made

    def say(self, message: Any) -> None:
        self.control.send(encode(message))

    def hear(self, kind: type[T]) -> T:
        while not isinstance(message := decode(self.control.recv(), TO_WORKER), kind):
            pass
        return message

    def beat(self, port: int, beat: Beat) -> None:
        self.heartbeat.connect(f"tcp://{self._host}:{port}")
        self.heartbeat.send(encode(beat))

    def close(self) -> None:
        self.control.close()
        self.heartbeat.close()


def hello(worker_id: int) -> Hello:
    return Hello(
        worker_id=worker_id,
        host="elsewhere",
        pid=1,
        generation=0,
        members=(),
        program="",
        session=SESSION,
    )


def eventually(check: Callable[[], bool]) -> None:
    """Until `check` holds; the test's own time limit ends it otherwise."""
    pause = threading.Event()
    while not check():
        pause.wait(0.005)


@pytest.mark.parametrize("with_key", [True, False])
def test_a_ring_forms_and_leaves(site: Site, with_key: bool) -> None:
    if not with_key:
        site.key = None
    coordinator = site.serve(3, encrypt_data=True)
    ears = [Ear() for _ in range(3)]
    links = [site.worker(worker_id, ear) for worker_id, ear in enumerate(ears)]
    tokens: list[tuple[JobKey, bool]] = []

    def bind(token: JobKey, encrypt: bool) -> str:
        tokens.append((token, encrypt))
        return f"tcp://127.0.0.1:{len(tokens)}"

    joining = [site.submit(link.join, bind) for link in links]
    views = [future.result(PATIENCE_S) for future in joining]
    assert [view.rank for view in views] == [0, 1, 2]
    assert len({view.members for view in views}) == 1
    assert {view.number for view in views} == {1}
    assert all(member.pid == os.getpid() and member.host == "here" for member in views[0].members)
    assert len(tokens) == 3 and len(set(tokens)) == 1
    assert tokens[0][1] is True
    assert tokens[0][0] != site.key

    first = site.submit(links[0].leave, 11)
    assert ears[1].next() == ears[2].next() == ("left", 0, 11)
    assert not first.done()
    others = [site.submit(link.leave, 12) for link in links[1:]]
    for future in (first, *others):
        future.result(PATIENCE_S)
    assert coordinator.wait(PATIENCE_S)
    coordinator.close()
    assert coordinator.statistics().refused == {}
    assert [event["event"] for event in site.events] == ["generation"]
    assert site.events[0]["t"] > 0


def test_a_ring_of_one(site: Site) -> None:
    site.serve(1)
    link = site.worker(0)
    (view,) = site.join(link)
    assert view.world_size == 1
    link.leave(0)


def test_steps_travel_with_the_heartbeat(site: Site) -> None:
    site.serve(1)
    link = site.worker(0)
    site.join(link)
    link.report_step(7)
    eventually(lambda: any(event.get("step") == 7 for event in site.events))


def test_a_dispute_is_answered_on_all_members(site: Site) -> None:
    site.serve(2)
    ears = [Ear(), Ear()]
    ears[1].answer = lambda sequence: f"barrier()\nas number {sequence}"
    links = [site.worker(worker_id, ear) for worker_id, ear in enumerate(ears)]
    site.join(*links)
    links[0].dispute(5)
    assert ears[0].next() == ears[1].next() == ("verdict", 5, ("call 5", "barrier() as number 5"))


def test_a_listener_that_raises_does_not_cost_the_ring(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.serve(2, timeouts=replace(TIMEOUTS, inquiry_timeout_s=0.2))
    ears = [Ear(), Ear()]

    def fail(sequence: int) -> str:
        raise RuntimeError("a bug")

    ears[1].answer = fail
    links = [site.worker(worker_id, ear) for worker_id, ear in enumerate(ears)]
    site.join(*links)
    links[0].dispute(5)
    assert ears[1].next() == ("verdict", 5, ("call 5", "no answer"))
    assert "a bug" in caplog.text


class TestLoss:
    def test_an_exit_that_a_launcher_reports(self, site: Site) -> None:
        site.serve(2)
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        launcher = site.launcher(messages.put)
        assignment = launcher.register("here", "127.0.0.1", 2, 29500, False)
        assert assignment == Assignment(
            first_worker_id=0,
            world_size=2,
            host_index=0,
            host_count=1,
            master_address="127.0.0.1",
            master_port=29500,
            hosts=("here",),
        )
        ear = Ear()
        links = [site.worker(0, ear), site.worker(1)]
        site.join(*links)
        assert messages.get(timeout=PATIENCE_S).event["event"] == "generation"
        launcher.worker_exited(1, 0, 137, "process killed by signal 9 (SIGKILL)")
        kind, error = ear.next()
        assert kind == "lost"
        assert str(error) == "rank 1 (worker 1 on here) lost: process killed by signal 9 (SIGKILL)"
        assert error.blames == 1
        with pytest.raises(PeerLostError):
            links[0].leave(3)
        found = [messages.get(timeout=PATIENCE_S) for _ in range(2)]
        assert isinstance(found[0], JobEvent) and found[0].event["event"] == "worker_lost"
        assert found[1] == JobFailed(
            worker_id=1, rank=1, host="here", code=137, reason="process killed by signal 9 (SIGKILL)"
        )

    def test_a_worker_that_falls_silent(self, site: Site) -> None:
        coordinator = site.serve(2, timeouts=replace(TIMEOUTS, heartbeat_timeout_s=1.5))
        ear = Ear()
        joining = site.submit(site.worker(0, ear).join, bind_to(0))
        frozen = Stranger(site)
        frozen.say(hello(1))
        port = frozen.hear(Welcome).heartbeat_port
        frozen.beat(port, Beat(worker_id=1, session=SESSION, generation=0, step=0, count=1))
        frozen.hear(Prepare)
        with pytest.raises(PeerLostError, match=r"no heartbeat for 1\.5 s"):
            joining.result(PATIENCE_S)
        assert frozen.hear(Lost).worker_id == 1
        assert coordinator.wait(PATIENCE_S)

    def test_last_words(self, site: Site) -> None:
        site.serve(2)
        ear = Ear()
        links = [site.worker(0, ear), site.worker(1)]
        site.join(*links)
        links[1].fail("ValueError: bad label", None)
        assert str(ear.next()[1]) == "rank 1 (worker 1 on here) lost: ValueError: bad label"

    def test_a_worker_dies_before_the_ring_has_formed(self, site: Site) -> None:
        site.serve(3)
        launcher = site.launcher()
        launcher.register("here", "127.0.0.1", 3, 29500, False)
        joining = [site.submit(site.worker(worker_id).join, bind_to(0)) for worker_id in (0, 1)]
        launcher.worker_exited(2, 0, 1, "process exited with code 1")
        for future in joining:
            with pytest.raises(PeerLostError, match="process exited with code 1"):
                future.result(PATIENCE_S)

    def test_leaving_does_not_wait_for_ever(self, site: Site) -> None:
        site.serve(2)
        links = [
            site.worker(worker_id, timeouts=replace(TIMEOUTS, shutdown_timeout_s=0.3)) for worker_id in (0, 1)
        ]
        site.join(*links)
        with pytest.raises(TimeoutError, match=r"still at work: rank 1 \(worker 1 on here\)"):
            links[0].leave(3)


class TestRefusal:
    def test_a_worker_id_that_is_taken(self, site: Site) -> None:
        coordinator = site.serve(2)
        first, second = site.worker(0), site.worker(0)
        joining = site.submit(first.join, bind_to(0))
        eventually(lambda: coordinator.statistics().members == 1)
        with pytest.raises(RefusedError, match=f"worker id 0 is taken by process {os.getpid()} on here"):
            second.join(bind_to(1))
        site.join(site.worker(1))
        assert joining.result(PATIENCE_S).world_size == 2

    def test_a_ring_that_is_complete(self, site: Site) -> None:
        site.serve(1)
        site.join(site.worker(0))
        with pytest.raises(RefusedError, match="joining later is not possible in this version"):
            site.worker(1).join(bind_to(1))

    def test_a_launcher_too_many(self, site: Site) -> None:
        site.serve(2)
        with pytest.raises(RefusedError, match="room for 2 more workers, and this launcher offers 3"):
            site.launcher().register("here", "127.0.0.1", 3, 29500, False)

    def test_another_protocol_version(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        site.serve(1)
        link = site.worker(0)
        monkeypatch.setattr("ringps.wire.control.PROTOCOL_VERSION", 99)
        frame = encode(hello(0))
        monkeypatch.undo()
        stranger = Stranger(site)
        stranger.control.send(frame)
        assert "install the same ringps" in stranger.hear(Refused).reason
        link.join(bind_to(0))

    def test_workers_that_never_come(self, site: Site) -> None:
        site.serve(3)
        impatient = replace(TIMEOUTS, rendezvous_timeout_s=0.3)
        with pytest.raises(SetupError, match=r"within 0\.3 s: 2 of 3 workers have not come: worker 0, 2"):
            site.worker(1, timeouts=impatient).join(bind_to(0))

    def test_launchers_that_never_come(self, site: Site) -> None:
        site.serve(3)
        impatient = replace(TIMEOUTS, rendezvous_timeout_s=0.3)
        with pytest.raises(SetupError, match="1 of 3 worker slots have come"):
            site.launcher(timeouts=impatient).register("here", "127.0.0.1", 1, 29500, False)


class TestConnecting:
    """Each of these must fail long before `connect_timeout_s`, which is set to the test's own limit."""

    def refused(self, site: Site, key: JobKey | None) -> None:
        site.key = key
        patient = replace(TIMEOUTS, connect_timeout_s=600.0)
        with pytest.raises(AuthenticationError, match=f"the coordinator at {site.address} refuses us: .*key"):
            site.worker(0, timeouts=patient).join(bind_to(0))
        with pytest.raises(AuthenticationError, match="--key-file"):
            site.launcher(timeouts=patient).register("here", "127.0.0.1", 1, 29500, False)

    def test_with_another_key(self, site: Site) -> None:
        site.serve(1)
        self.refused(site, JobKey.generate())

    def test_without_a_key(self, site: Site) -> None:
        site.serve(1)
        self.refused(site, None)

    def test_with_a_key_where_none_is_used(self, site: Site) -> None:
        site.key = None
        site.serve(1)
        self.refused(site, JobKey.generate())

    def test_knowing_only_the_public_half(self, site: Site) -> None:
        """A client that can greet the server, but with a key pair of its own."""
        coordinator = site.serve(1)
        assert site.key is not None
        stranger = JobKey.generate()
        context: zmq.Context[zmq.Socket[bytes]] = site.stack.enter_context(zmq.Context())
        dealer = context.socket(zmq.DEALER)
        stranger.secure_client(dealer)
        dealer.curve_serverkey = site.key.public
        dealer.linger = 0
        dealer.connect(f"tcp://{site.address}")
        dealer.send(encode(hello(0)))
        eventually(lambda: coordinator.statistics().connections_refused > 0)
        dealer.close()
        assert coordinator.statistics().frames_received == 0

    def test_where_nobody_listens(self, site: Site) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
            site.address = f"127.0.0.1:{taken.getsockname()[1]}"
            impatient = replace(TIMEOUTS, connect_timeout_s=0.3)
            with pytest.raises(CoordinatorUnreachableError) as caught:
                site.worker(0, timeouts=impatient).join(bind_to(0))
        assert str(caught.value) == (
            f"no coordinator answers at {site.address} (tried for 0.3 s); "
            "is `ringps coordinator` or `ringps run` running there?"
        )

    def test_where_somebody_listens_but_says_nothing(self, site: Site) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            site.address = f"127.0.0.1:{mute.getsockname()[1]}"
            impatient = replace(TIMEOUTS, connect_timeout_s=0.3)
            with pytest.raises(CoordinatorUnreachableError, match=r"accepts connections .* does not answer"):
                site.worker(0, timeouts=impatient).join(bind_to(0))

    @pytest.mark.parametrize("address", ["nonsense", "host:", "host:0", "host:x", ":1", "::1:5"])
    def test_to_a_malformed_address(self, site: Site, address: str) -> None:
        site.address = address
        with pytest.raises(SetupError, match="the coordinator's address"):
            site.worker(0).join(bind_to(0))

    def test_close_ends_a_join_that_waits(self, site: Site) -> None:
        site.serve(2)
        link = site.worker(0)
        joining = site.submit(link.join, bind_to(0))
        link.close()
        with pytest.raises(ClosedError):
            joining.result(PATIENCE_S)

    def test_close_ends_a_register_that_waits(self, site: Site) -> None:
        coordinator = site.serve(2)
        link = site.launcher()
        registering = site.submit(link.register, "here", "127.0.0.1", 1, 29500, False)
        eventually(lambda: coordinator.statistics().launchers == 1)
        link.close()
        with pytest.raises(ClosedError):
            registering.result(PATIENCE_S)
        eventually(lambda: coordinator.statistics().launchers == 0)


class TestListening:
    @pytest.mark.parametrize("distance", [0, 1])
    def test_where_another_does(self, distance: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(AddressInUseError, match=f"127.0.0.1:{port} is in use"):
                Coordinator(CoordinatorSettings(port=port - distance), None)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
    def test_beyond_this_machine_without_a_key(self, host: str) -> None:
        with pytest.raises(SetupError, match="without a job key"):
            Coordinator(CoordinatorSettings(host=host), None)

    def test_where_nobody_can(self) -> None:
        with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1:0"):
            Coordinator(CoordinatorSettings(host="192.0.2.1"), JobKey.generate())

    def test_a_coordinator_that_was_never_started_can_be_closed(self) -> None:
        coordinator = Coordinator(CoordinatorSettings(), JobKey.generate())
        coordinator.close()
        coordinator.close()
        assert coordinator.wait(0)

    def test_by_name(self, site: Site) -> None:
        site.serve(1, host="localhost")
        assert site.address.startswith("localhost:")
        site.join(site.worker(0))

    @pytest.mark.parametrize(
        "wrong", [{"port": 65535}, {"world_size": 0}, {"world_size": 1025}, {"settle_s": -1.0}]
    )
    def test_settings_are_checked(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CoordinatorSettings(**wrong)


class TestWithoutTheCoordinator:
    def test_a_worker_warns_once_and_goes_on(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        quick = replace(TIMEOUTS, heartbeat_timeout_s=0.2)
        coordinator = site.serve(1)
        link = site.worker(0, timeouts=quick)
        site.join(link)
        with caplog.at_level(logging.WARNING, logger="ringps"):
            coordinator.close()
            link.leave(3)  # returns once it is clear that nobody will answer
        warnings = [record.message for record in caplog.records]
        assert len(warnings) == 1
        assert warnings[0].startswith(f"the coordinator at {site.address} is gone; training goes on")

    def test_a_launcher_is_told(self, site: Site) -> None:
        quick = replace(TIMEOUTS, heartbeat_timeout_s=0.2)
        coordinator = site.serve(1)
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        site.launcher(messages.put, timeouts=quick).register("here", "127.0.0.1", 1, 29500, False)
        coordinator.close()
        assert messages.get(timeout=PATIENCE_S) == CoordinatorLost(
            f"the coordinator at {site.address} is gone"
        )

    def test_a_join_that_waits_is_told(self, site: Site) -> None:
        coordinator = site.serve(2)
        link = site.worker(0, timeouts=replace(TIMEOUTS, heartbeat_timeout_s=0.2))
        joining = site.submit(link.join, bind_to(0))
        eventually(lambda: coordinator.statistics().members == 1)
        coordinator.close()
        with pytest.raises(CoordinatorUnreachableError, match="is gone"):
            joining.result(PATIENCE_S)


def test_a_bug_in_the_coordinator_is_reported_and_survived(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = site.serve(1)
    handle = coordinator._quorum.handle
    bugs = iter([RuntimeError("a bug")])

    def stumble(event: Any, now_s: float) -> Any:
        for bug in bugs:
            raise bug
        return handle(event, now_s)

    monkeypatch.setattr(coordinator._quorum, "handle", stumble)
    eventually(lambda: coordinator.statistics().internal_errors == 1)
    site.join(site.worker(0))
    assert site.events[0]["event"] == "coordinator_error"
    assert site.events[0]["reason"] == "RuntimeError: a bug"
    found = capfd.readouterr().err
    assert "internal error in the coordinator" in found and "Traceback" in found


def test_an_event_callback_that_raises_does_not_cost_the_ring(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = site.serve(1)

    def stumble(event: dict[str, Any]) -> None:
        raise OSError("disk full")

    coordinator._on_event = stumble
    link = site.worker(0)
    site.join(link)
    link.leave(0)
    assert coordinator.wait(PATIENCE_S)
    assert coordinator.statistics().internal_errors == 1
    assert "disk full" in capfd.readouterr().err


def test_launchers_settle_without_a_world_size(site: Site) -> None:
    coordinator = site.serve(None, settle_s=0.5)
    heard: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue(), queue.SimpleQueue()]
    links = [site.launcher(box.put) for box in heard]
    registering = []
    for index, link in enumerate(links):
        arguments = (f"node-{index}", f"10.0.0.{index}", 1, 29500, False)
        registering.append(site.submit(link.register, *arguments))
        eventually(lambda count=index + 1: coordinator.statistics().launchers == count)  # type: ignore[misc]
    plans = [future.result(PATIENCE_S) for future in registering]
    assert [plan.first_worker_id for plan in plans] == [0, 1]
    assert {plan.world_size for plan in plans} == {2}
    for worker_id, link in enumerate(links):
        link.worker_exited(worker_id, 0, 0, "process exited with code 0")
    assert [box.get(timeout=PATIENCE_S) for box in heard] == [JobDone(), JobDone()]
    assert coordinator.wait(PATIENCE_S)


def test_a_connection_that_breaks_is_made_again(site: Site) -> None:
    """Through a proxy whose connections are cut: the worker is recognised when it comes back."""
    coordinator = site.serve(2)
    with Proxy(site.address) as proxy:
        ears = [Ear(), Ear()]
        links = [site.worker(0, ears[0], coordinator=proxy.address), site.worker(1, ears[1])]
        site.join(*links)
        proxy.cut()
        proxy.wait_for_connections(2)
        links[0].dispute(3)
        assert ears[0].next() == ears[1].next() == ("verdict", 3, ("call 3", "call 3"))
        assert coordinator.statistics().members == 2


class Proxy:
    """Forwards TCP connections to a coordinator's control socket, until it cuts them."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._changed = threading.Condition()
        self._accepted = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        with self._changed:
            for client in self._open:
                client.shutdown(socket.SHUT_RDWR)

    def wait_for_connections(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._accepted >= count, PATIENCE_S)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._start(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            with self._changed:
                self._open.append(client)
                self._accepted += 1
                self._changed.notify_all()
            other = {client: server, server: client}
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        with self._changed:
                            self._open.remove(client)
                        return
                    other[source].sendall(data)
