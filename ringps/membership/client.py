"""A worker's link to the coordinator."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ringps.config import Timeouts
from ringps.errors import ClosedError, CoordinatorUnreachableError, PeerLostError, SetupError
from ringps.membership.channel import ControlChannel
from ringps.membership.rendezvous import Rendezvous, lost_error, new_session
from ringps.ring.topology import Generation, Member
from ringps.transport.keys import JobKey
from ringps.wire.control import (
    TO_WORKER,
    AllLeft,
    Beat,
    Bound,
    CallReport,
    Dispute,
    Failing,
    Form,
    Hello,
    Inquire,
    Leaving,
    Left,
    Lost,
    Prepare,
    Verdict,
    Welcome,
    clip,
    clip_line,
)
from ringps.wire.rules import MAX_CALL_BYTES
from ringps.worker_env import WorkerEnv

LAST_WORDS_S = 0.5
"""How long a link that closes may take to get its last message out."""

_log = logging.getLogger("ringps")


class Listener(Protocol):
    """Who hears what becomes of the ring.

    Called on the link's own thread, also before `WorkerLink.join` has returned; must return at once.
    """

    def on_lost(self, error: PeerLostError) -> None:
        """A member is gone; the ring cannot go on."""

    def on_left(self, rank: int, completed: int) -> None:
        """That rank finished `completed` collectives and called shutdown()."""

    def on_inquiry(self, sequence: int) -> str:
        """What this rank called as collective number `sequence`, or where it is instead."""

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """The answer to a dispute: `calls[rank]` is what that rank called."""


class WorkerLink:
    """Joins the ring, tells the coordinator that this worker lives, and hears of the others."""

    def __init__(self, env: WorkerEnv, timeouts: Timeouts, listener: Listener) -> None:
        """
        Raises:
            SetupError: the job key cannot be read.
        """
        self._env = env
        self._timeouts = timeouts
        self._listener = listener
        key = None if env.key_file is None else JobKey.load(env.key_file)
        self._channel = ControlChannel(env.coordinator, key, timeouts, TO_WORKER, self)
        self._rendezvous = Rendezvous(self._channel, timeouts)
        self._session = new_session()
        self._step = 0
        self._changed = threading.Condition()
        self._generation = 0
        self._members: tuple[Member, ...] = ()
        self._left: set[int] = set()
        self._all_left = False
        self._lost: PeerLostError | None = None
        self._gone = False
        self._ended = False

    def join(self, bind: Callable[[JobKey, bool], str]) -> Generation:
        """Take part in forming the ring; blocks until it is formed.

        Args:
            bind: called once with the generation's token and whether data must be encrypted;
                returns the address where this worker's data socket then listens.

        Raises:
            CoordinatorUnreachableError: nobody answers at the coordinator's address.
            AuthenticationError: the coordinator holds another key.
            RefusedError: it does not take this worker, and why.
            PeerLostError: a worker died before the ring was formed.
            SetupError: workers did not come within `rendezvous_timeout_s`; the message names them.
            ClosedError: `close` was called meanwhile.
        """
        hello = Hello(
            worker_id=self._env.worker_id,
            host=clip_line(self._env.host),
            pid=os.getpid(),
            generation=0,
            session=self._session,
        )
        self._rendezvous.greet(hello, Welcome)
        prepare = self._rendezvous.wait_for(Prepare, "the ring did not form")
        token = JobKey(prepare.token_public.encode(), prepare.token_secret.encode())
        address = bind(token, prepare.encrypt)
        self._channel.send(Bound(generation=prepare.generation, address=address))
        form = self._rendezvous.wait_for(Form, "the ring did not form")
        return self._view(prepare, form)

    def dispute(self, sequence: int) -> None:
        """Ranks seem to disagree on collective `sequence`; `on_verdict` comes on all members. Any thread."""
        self._channel.send(Dispute(generation=self._generation, sequence=sequence))

    def report_step(self, step: int) -> None:
        """How far this rank is; travels with the next heartbeat. Any thread."""
        self._step = step

    def leave(self, completed: int) -> None:
        """Say that this rank is done after `completed` collectives, and wait for the others.

        Returns at once if the coordinator is gone: then nobody can say when they are done. Does
        nothing before `join` has returned.

        Raises:
            PeerLostError: a member was lost.
            TimeoutError: others did not leave within `shutdown_timeout_s`; the message names them.
        """
        if not self._generation:
            return
        self._channel.send(Leaving(generation=self._generation, completed=completed))
        with self._changed:
            self._changed.wait_for(
                lambda: self._all_left or self._lost or self._gone or self._ended,
                timeout=self._timeouts.shutdown_timeout_s,
            )
            if self._lost is not None:
                raise self._lost
            if not (self._all_left or self._gone or self._ended):
                raise TimeoutError(
                    f"after {self._timeouts.shutdown_timeout_s:g} s (shutdown_timeout_s) still at work: "
                    + self._still_at_work()
                )

    def fail(self, reason: str, blames: int | None) -> None:
        """This process is about to exit with an error. Takes at most `LAST_WORDS_S`; ends the link.

        Args:
            reason: the error, in words.
            blames: the worker whose failure this one follows from, or None if it is our own.
        """
        self._channel.send(Failing(reason=clip(reason), blames=blames))
        self.close()

    def close(self) -> None:
        """End the link. A join or leave that still waits is told. Safe to call again."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._rendezvous.fail(ClosedError("the link to the coordinator was closed"))
        self._channel.close(LAST_WORDS_S)

    # Called by the channel, on its thread.

    def on_message(self, message: Any) -> None:
        match message:
            case Welcome(heartbeat_port=port):
                self._channel.start_heartbeat(port, self._make_beat)
                self._rendezvous.deliver(message)
            case Form() if not self._generation:
                self._generation = message.generation
                self._rendezvous.deliver(message)
            case Lost():
                self._on_lost(message)
            case Left() | AllLeft() | Inquire() | Verdict():
                if message.generation == self._generation:
                    self._on_ring(message)
            case _:
                self._rendezvous.deliver(message)

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        self._rendezvous.fail(error)
        if self._generation and not (self._all_left or self._lost):
            _log.warning(
                "%s; training goes on, but from now on only the data connections tell when a worker is lost",
                error,
            )
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _on_lost(self, lost: Lost) -> None:
        if not self._generation:
            self._rendezvous.deliver(lost)
            return
        error = lost_error(lost)
        with self._changed:
            if self._lost is not None:
                return
            self._lost = error
            self._changed.notify_all()
        self._listener.on_lost(error)

    def _on_ring(self, message: Left | AllLeft | Inquire | Verdict) -> None:
        match message:
            case Left(rank=rank, completed=completed):
                if rank in self._left:
                    return
                with self._changed:
                    self._left.add(rank)
                self._listener.on_left(rank, completed)
            case AllLeft():
                with self._changed:
                    self._all_left = True
                    self._changed.notify_all()
            case Inquire(sequence=sequence):
                call = clip_line(self._listener.on_inquiry(sequence), MAX_CALL_BYTES)
                self._channel.send(CallReport(generation=self._generation, sequence=sequence, call=call))
            case Verdict(sequence=sequence, calls=calls):
                self._listener.on_verdict(sequence, calls)

    def _make_beat(self, count: int) -> Beat:
        return Beat(
            worker_id=self._env.worker_id,
            session=self._session,
            generation=self._generation,
            step=self._step,
            count=count,
        )

    def _view(self, prepare: Prepare, form: Form) -> Generation:
        if form.generation != prepare.generation or len(form.addresses) != len(prepare.members):
            raise SetupError("the coordinator formed another ring than it had prepared")
        self._members = tuple(
            Member(worker_id=seat.worker_id, host=seat.host, address=address, pid=seat.pid)
            for seat, address in zip(prepare.members, form.addresses, strict=True)
        )
        ranks = [rank for rank, seat in enumerate(self._members) if seat.worker_id == self._env.worker_id]
        if len(ranks) != 1:
            raise SetupError("the coordinator formed a ring without us")
        return Generation(number=form.generation, members=self._members, rank=ranks[0])

    def _still_at_work(self) -> str:
        return ", ".join(
            f"rank {rank} (worker {member.worker_id} on {member.host})"
            for rank, member in enumerate(self._members)
            if rank not in self._left and member.worker_id != self._env.worker_id
        )
