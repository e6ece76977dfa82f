"""From a generation to what carries its collectives out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import torch

from ringps.collectives.backend import Backend
from ringps.collectives.choice import Choice, choose
from ringps.collectives.device import DeviceBackend
from ringps.collectives.disputes import EXPLANATION_S, Docket, Referee
from ringps.collectives.hierarchical import Hierarchical
from ringps.collectives.ring_backend import RingBackend
from ringps.collectives.serial import SerialBackend
from ringps.collectives.shm.executor import SharedMemory
from ringps.collectives.shm.group import HEAP_START, LocalGroup, forget_phases
from ringps.collectives.shm.links import LocalListener, NotHere
from ringps.collectives.shm.memory import Area
from ringps.collectives.shm.signals import Peer
from ringps.config import Config, TransportName
from ringps.errors import PeerLostError, SetupError
from ringps.ring.lanes import hosts, lanes
from ringps.ring.topology import Generation
from ringps.transport.keys import JobKey
from ringps.transport.tcp import TcpListener, TcpTransport
from ringps.transport.zmq_tcp import ZmqTcpListener
from ringps.worker_env import WorkerEnv

_MOST_SHARED_BYTES = 64 << 30
"""Address space of a segment, at most; a machine's memory, if that is less."""


_LOOK_S = 0.05
"""How long to wait for a member at a time, before looking whether it is still there."""


class SharedArea:
    """This process's shared memory, made when it is first needed; it outlives generations."""

    def __init__(self) -> None:
        self._area: Area | None = None

    def open(self) -> Area:
        """The area.

        Raises:
            SetupError, OSError, MemoryError: the system gives no shared memory.
        """
        if self._area is None:
            memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            size_bytes = max(min(memory_bytes, _MOST_SHARED_BYTES), 4 * HEAP_START)
            self._area = Area(size_bytes, HEAP_START)
        return self._area

    def allocate_if_there(self, size_bytes: int) -> torch.Tensor:
        """Memory (uint8) of the area if it was ever needed, so that a ring that grows again can share it."""
        if self._area is None:
            return torch.empty(size_bytes, dtype=torch.uint8)
        return self._area.heap.allocate(size_bytes)

    def close(self) -> None:
        """Give it up; memory in use stays."""
        if self._area is not None:
            self._area.close()


class Formed(NamedTuple):
    """A ring that is ready."""

    backend: Backend
    summary: str
    """What it is, in a line for people."""


class Doors:
    """Where other members find this worker, on its host and from elsewhere, before it knows them."""

    def __init__(
        self,
        env: WorkerEnv,
        token: JobKey,
        config: Config,
        *,
        encrypt: bool,
        area: SharedArea | None = None,
        elastic: bool = False,
    ) -> None:
        """Listen.

        Args:
            env: this worker.
            token: the generation's.
            config: settings.
            encrypt: whether what leaves the host is to be encrypted.
            area: this process's shared memory; None: of this generation alone.
            elastic: a member that cannot be met is not the end: report it at once.

        Raises:
            SetupError: the address is not this machine's, or the system allows no Unix sockets.
        """
        self._config = config
        self._area = area or SharedArea()
        self._elastic = elastic
        self._explanation_s = 0.0 if elastic else EXPLANATION_S
        timeouts = config.timeouts
        self._limit_s = timeouts.reform_timeout_s if elastic else timeouts.connect_timeout_s
        self._asked: TransportName = config.transport
        self._check: Callable[[], None] = lambda: None
        self._local = None if self._asked in ("tcp", "zmq") else LocalListener(token, env.worker_id)
        self._tcp: TcpListener | ZmqTcpListener | None = None
        try:
            if encrypt or self._asked == "zmq":
                self._tcp = ZmqTcpListener(
                    env.address,
                    token,
                    config.exchange,
                    encrypt=encrypt,
                    silent_link_s=timeouts.silent_link_s,
                )
            elif self._asked != "shm":
                self._tcp = TcpListener(
                    env.address, token, config.exchange, silent_link_s=timeouts.silent_link_s
                )
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """For the other members: the transport that this worker was asked to use, a word that stands for
        its settings, and where it listens."""
        settings = repr((self._config.exchange, self._config.recovery)).encode()
        word = blake2b(settings, digest_size=4).hexdigest()
        return f"{self._asked}/{word} {self._tcp.address if self._tcp is not None else ''}"

    def form(
        self, generation: Generation, referee: Referee, check: Callable[[], None] = lambda: None
    ) -> Formed:
        """Connect to those that this rank exchanges data with. The doors are closed then.

        Args:
            generation: all members, with their `address` as above.
            referee: asked when ranks disagree.
            check: called now and then while this waits for others; raises if a member is known to be lost.

        Raises:
            RingpsError: what `check` raised.
            SetupError: the members want different transports, or one that cannot be had.
            PeerLostError: a member is gone.
        """
        words, addresses = zip(*(one.address.split(" ", 1) for one in generation.members), strict=True)
        members = tuple(
            replace(member, address=address)
            for member, address in zip(generation.members, addresses, strict=True)
        )
        view = replace(generation, members=members)
        self._check = check
        by_host = hosts(view)
        try:
            choice = _choose(view, words, by_host)
        except SetupError:
            self.close()
            raise
        try:
            backend = self._build(choice, view, referee)
        except NotHere as error:
            self.close()
            if not self._elastic:
                self._await_explanation()
                raise
            member = view.members[error.rank]
            raise PeerLostError(
                rank=error.rank, worker_id=member.worker_id, host=member.host, reason=str(error)
            ) from error
        except (PeerLostError, SetupError):
            self.close()
            self._await_explanation()
            raise
        except BaseException:
            self.close()
            raise
        count = len(by_host)
        summary = (
            f"{view.world_size} workers on {count} host{'s' if count > 1 else ''}, "
            f"transport {choice.way} ({choice.reason})"
        )
        return Formed(backend, summary)

    def _await_explanation(self) -> None:
        """A member that cannot be met may have died, and whoever saw it can say why."""
        given_up_s = time.monotonic() + self._explanation_s
        while time.monotonic() < given_up_s:
            self._check()
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Give up. Idempotent."""
        if self._local is not None:
            self._local.close()
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None

    def _build(self, choice: Choice, view: Generation, referee: Referee) -> Backend:
        config = self._config
        if choice.way == "alone":
            self.close()
            alone = RingBackend(
                view, None, config.exchange, config.timeouts, None, allocate=self._area.allocate_if_there
            )
            return DeviceBackend(alone, view, config)
        docket = Docket(view, config.timeouts, referee, explanation_s=self._explanation_s)
        if choice.way == "shm":
            executor = SharedMemory(self._meet(view))
            self.close()
            return DeviceBackend(SerialBackend(view, executor, docket), view, config, executor)
        if choice.way == "hierarchical":
            group = self._meet(view)
            try:
                between = Hierarchical(group, lambda referee: self._lane(view, referee), view, docket)
            except BaseException:
                group.close()
                raise
            self.close()
            return DeviceBackend(SerialBackend(view, between, docket), view, config)
        backend = self._over_tcp(view, referee)
        self.close()
        return DeviceBackend(backend, view, config)

    def _over_tcp(self, view: Generation, referee: Referee | None) -> Backend:
        assert self._tcp is not None
        tcp, self._tcp = self._tcp, None
        transport = tcp.connect(view)
        if isinstance(transport, TcpTransport):
            try:
                transport.establish(self._limit_s, self._check)
            except BaseException:
                transport.close()
                raise
        return RingBackend(
            view,
            transport,
            self._config.exchange,
            self._config.timeouts,
            referee,
            explanation_s=self._explanation_s,
        )

    def _lane(self, view: Generation, referee: Referee) -> Backend | None:
        """The ring between hosts that this rank is in, if any."""
        for lane in lanes(hosts(view)):
            if view.rank in lane:
                members = tuple(view.members[rank] for rank in lane)
                between = Generation(number=view.number, members=members, rank=lane.index(view.rank))
                return self._over_tcp(between, referee)
        return None

    def _meet(self, view: Generation) -> LocalGroup:
        """Join this host's members."""
        assert self._local is not None
        ranks = view.local_ranks
        limit_s = self._limit_s
        try:
            area = self._area.open()
        except (OSError, MemoryError) as error:
            raise SetupError(f"cannot share memory on this host: {error}") from error
        forget_phases(area)
        peers = self._local.connect(view, ranks, area.segment, limit_s, self._check)
        small_bytes = self._config.exchange.doubling_bytes
        group = LocalGroup(area, peers, ranks.index(view.rank), small_bytes=small_bytes)
        group.signals.attend = self._attend_until(time.monotonic() + limit_s, group, view)
        try:
            group.barrier((0, 0))
        except BaseException:
            group.close()
            raise
        return group

    def _attend_until(
        self, deadline_s: float, group: LocalGroup, view: Generation
    ) -> Callable[[Peer, float], float]:
        """What a wait does while the group forms."""

        def attend(peer: Peer, since_s: float) -> float:
            self._check()
            if time.monotonic() >= deadline_s:
                lost = group.signals.gone[0] if group.signals.gone else peer
                member = view.members[lost.rank]
                raise PeerLostError(
                    rank=lost.rank,
                    worker_id=member.worker_id,
                    host=member.host,
                    reason="did not answer its neighbours on this host while the ring formed",
                )
            return _LOOK_S

        return attend


def _choose(view: Generation, words: Sequence[str], by_host: Sequence[Sequence[int]]) -> Choice:
    """The way to exchange data. `words[rank]` is what it was asked for, and stands for its settings."""
    asked, _, settings = zip(*(word.partition("/") for word in words), strict=True)
    choice = choose(asked, by_host)
    for rank, other in enumerate(settings):
        if other != settings[0]:
            raise SetupError(
                f"{view.describe(0)} and {view.describe(rank)} were started with different settings of "
                "ringps.Exchange or ringps.Recovery (RINGPS_* variables); start all with the same"
            )
    return choice
