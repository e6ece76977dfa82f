"""The composition root: puts a worker's parts together and takes them apart again.

The only module that knows of all rooms.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from dataclasses import dataclass
from hashlib import blake2b

from ringps import worker_env
from ringps.collectives import Communicator, ElasticCommunicator, current, use
from ringps.collectives.awaiting import AwaitingBackend, prospect
from ringps.collectives.backend import Backend
from ringps.collectives.device import DeviceBackend
from ringps.collectives.ring_backend import RingBackend
from ringps.config import Config
from ringps.data import sampler
from ringps.errors import PeerLostError, RingChangedError, RingpsError
from ringps.membership import JobOver
from ringps.optim import admission
from ringps.regroup import Regroup, blamed
from ringps.ring.topology import Generation, Member
from ringps.worker_env import WorkerEnv


@dataclass(frozen=True)
class _Ring:
    """This process's parts, and the process that they belong to."""

    communicator: Communicator
    regroup: Regroup | None
    alone: Backend | None
    pid: int

    @property
    def backend(self) -> Backend:
        backend = self.alone if self.regroup is None else self.regroup.backend
        assert backend is not None
        return backend


_ring: _Ring | None = None


def init(config: Config | None = None) -> None:
    """Join the ring.

    Started by `ringps run`, this waits until all workers of the job have come. A worker that starts while a
    ring runs already does not wait: it gets the members' state when its script comes to
    `TrainState.steps`, and is a member from then on. Started by hand it makes a ring of one, so that the same
    script runs alone.

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
    admission.use(_ring.regroup)


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
    admission.use(None)
    if ring is None or ring.pid != os.getpid():
        return
    try:
        member = not ring.communicator.joining and not (ring.regroup and ring.regroup.departed)
        if member:
            _finish(ring)
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
    host = RingBackend(view, None, config.exchange, config.timeouts, None)
    backend = DeviceBackend(host, view, config)
    return _Ring(Communicator(view, backend), None, backend, os.getpid())


def _join(env: WorkerEnv, config: Config) -> _Ring:
    regroup = Regroup(env, config, _program())
    link = regroup.link
    try:
        first = regroup.first()
    except JobOver:
        regroup.close()
        print("ringps: the job ended before this worker could join it", file=sys.stderr)
        raise SystemExit(0) from None
    except BaseException as error:
        link.fail(f"{type(error).__name__}: {error}", blamed(error))
        regroup.close()
        raise
    communicator: Communicator
    if first is None:
        view = prospect(env, link.running)
        communicator = ElasticCommunicator(
            view,
            AwaitingBackend(),
            regroup,
            config.recovery,
            on_step=link.report_step,
            joining=True,
            least=link.least,
        )
        return _Ring(communicator, regroup, None, os.getpid())
    view, formed = first
    if view.rank == 0 and view.world_size > 1:
        print(f"ringps: {formed.summary}", file=sys.stderr)
    if link.elastic:
        communicator = ElasticCommunicator(
            view, formed.backend, regroup, config.recovery, on_step=link.report_step, least=link.least
        )
    else:
        communicator = Communicator(view, formed.backend, on_step=link.report_step)
    return _Ring(communicator, regroup, None, os.getpid())


def _finish(ring: _Ring) -> None:
    """Wait until all ranks have finished; what is lost on the way concerns an elastic ring only."""
    while True:
        try:
            ring.backend.drain()
            if ring.regroup is not None:
                ring.regroup.link.leave(ring.backend.completed, suspended=ring.regroup.suspended)
            return
        except (PeerLostError, RingChangedError) as error:
            if not isinstance(ring.communicator, ElasticCommunicator):
                raise
            ring.communicator.reform(error)
            ring.communicator.settle()


def _take_apart(ring: _Ring) -> None:
    if ring.regroup is not None:
        ring.regroup.close()
    else:
        ring.backend.close()


def _program() -> str:
    """Names this process's script by its contents; "" if it has none."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        with open(path or "", "rb") as script:
            return blake2b(script.read(), digest_size=8).hexdigest()
    except OSError:
        return ""


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
    if ring.regroup is not None:
        # The others are to know at once why this worker ends, and whose fault it is if not its own.
        ring.regroup.link.fail(f"{type(error).__name__}: {error}", blamed(error))
    _take_apart(ring)


def _forget() -> None:
    """A forked child (a DataLoader worker) has none of the ring's threads: it is not in the ring."""
    global _ring
    _ring = None
    use(None)
    admission.use(None)


os.register_at_fork(after_in_child=_forget)
