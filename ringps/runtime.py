"""The composition root: puts a worker's parts together and takes them apart again.

The only module that knows of all rooms.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from dataclasses import dataclass

from ringps import worker_env
from ringps.collectives import Communicator, current, use
from ringps.collectives.backend import Backend
from ringps.collectives.formation import Doors
from ringps.collectives.ring_backend import RingBackend
from ringps.config import Config
from ringps.data import sampler
from ringps.errors import PeerLostError, RingBrokenError, RingpsError
from ringps.membership import JobKey, WorkerLink
from ringps.ring.topology import Generation, Member
from ringps.worker_env import WorkerEnv


class _Bridge:
    """Takes what the coordinator says to the engine. Called on the link's thread."""

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self._early: PeerLostError | None = None

    def attach(self, backend: Backend) -> None:
        self.backend = backend
        if self._early is not None:
            backend.fail(self._early)

    def check(self) -> None:
        """Raise if a member was lost before the ring was there."""
        if self._early is not None:
            raise self._early

    def on_lost(self, error: PeerLostError) -> None:
        self._early = error
        if self.backend is not None:
            self.backend.fail(error)

    def on_left(self, rank: int, completed: int) -> None:
        if self.backend is not None:
            self.backend.peer_left(rank, completed)

    def on_inquiry(self, sequence: int) -> str:
        return self.backend.describe(sequence) if self.backend is not None else "no ring yet"

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        if self.backend is not None:
            self.backend.verdict(sequence, calls)


@dataclass(frozen=True)
class _Ring:
    """This process's parts, and the process that they belong to."""

    communicator: Communicator
    backend: Backend
    link: WorkerLink | None
    pid: int


_ring: _Ring | None = None


def init(config: Config | None = None) -> None:
    """Join the ring.

    Started by `ringps run`, this waits until all workers of the job have come. Started by hand it
    makes a ring of one, so that the same script runs alone.

    Args:
        config: settings; None takes the defaults, changed by `RINGPS_*` variables.

    Raises:
        SetupError: the coordinator cannot be reached, holds another key, or refused this worker.
        PeerLostError: a worker died before the ring was formed.
        ValueError: called a second time, or a malformed variable.
    """
    global _ring
    if _ring is not None:
        raise ValueError("ringps.init() was called already; call it once, before everything else")
    config = config or worker_env.configure()
    env = worker_env.read()
    _ring = _join(env, config) if env is not None else _alone(config)
    use(_ring.communicator)


def shutdown() -> None:
    """Leave the ring, once the other ranks have finished too. Does nothing without a ring.

    Also happens by itself when the script ends. After it, `init` may not be called again: the
    job's ring is complete.

    Raises:
        RingBrokenError: a member was lost, or left while this rank still needed it.
        TimeoutError: the other ranks did not finish within `shutdown_timeout_s`.
    """
    global _ring
    ring, _ring = _ring, None
    use(None)
    if ring is None or ring.pid != os.getpid():
        return
    try:
        ring.backend.drain()
        if ring.link is not None:
            ring.link.leave(ring.backend.completed)
    finally:
        _take_apart(ring)


class ElasticBatchSampler(sampler.ElasticBatchSampler):
    """This rank's share of each global batch; see `ringps.data.sampler.ElasticBatchSampler`."""

    def __init__(
        self,
        dataset_len: int,
        global_batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            dataset_len,
            global_batch_size,
            seed,
            shuffle=shuffle,
            drop_last=drop_last,
            place=lambda: (current().rank, current().world_size),
        )


def _alone(config: Config) -> _Ring:
    member = Member(worker_id=0, host=socket.gethostname(), address="", pid=os.getpid())
    view = Generation(number=1, members=(member,), rank=0)
    backend = RingBackend(view, None, config.exchange, config.timeouts, None)
    return _Ring(Communicator(view, backend), backend, None, os.getpid())


def _join(env: WorkerEnv, config: Config) -> _Ring:
    bridge = _Bridge()
    doors: list[Doors] = []

    def bind(token: JobKey, encrypt: bool) -> str:
        doors.append(Doors(env, token, config, encrypt=encrypt))
        return doors[-1].address

    link = WorkerLink(env, config.timeouts, bridge)
    try:
        view = link.join(bind)
        formed = doors[-1].form(view, link, bridge.check)
    except BaseException as error:
        for door in doors:
            door.close()
        _give_up(link, error)
        raise
    bridge.attach(formed.backend)
    if view.rank == 0 and view.world_size > 1:
        print(f"ringps: {formed.summary}", file=sys.stderr)
    communicator = Communicator(view, formed.backend, on_step=link.report_step)
    return _Ring(communicator, formed.backend, link, os.getpid())


def _take_apart(ring: _Ring) -> None:
    ring.backend.close()
    if ring.link is not None:
        ring.link.close()


@atexit.register
def _at_exit() -> None:
    """Leave in order if the script ended well; else say so at once, and do not wait for others."""
    global _ring
    if _ring is None or _ring.pid != os.getpid():
        return
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        try:
            shutdown()
        except (RingpsError, TimeoutError) as late:
            print(f"ringps: while leaving the ring: {late}", file=sys.stderr)
        return
    ring, _ring = _ring, None
    ring.backend.close()
    if ring.link is not None:
        _give_up(ring.link, error)


def _give_up(link: WorkerLink, error: BaseException) -> None:
    """Let the others know why this worker ends, and whose fault it is if not its own."""
    blames = error.blames if isinstance(error, RingBrokenError) else None
    link.fail(f"{type(error).__name__}: {error}", blames)


def _forget() -> None:
    """A forked child (a DataLoader worker) has none of the ring's threads: it is not in the ring."""
    global _ring
    _ring = None
    use(None)


os.register_at_fork(after_in_child=_forget)
