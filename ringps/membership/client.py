"""A worker's link to the coordinator."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from ringps import probe
from ringps.config import Timeouts
from ringps.errors import (
    ClosedError,
    CoordinatorUnreachableError,
    ExpelledError,
    RefusedError,
    RingChangedError,
    RingpsError,
    SetupError,
)
from ringps.membership.channel import ControlChannel
from ringps.membership.rendezvous import Rendezvous, lost_error, new_session
from ringps.ring.topology import Generation, Member
from ringps.transport.keys import JobKey
from ringps.wire.control import (
    TO_WORKER,
    Admitting,
    AllLeft,
    Ask,
    Beat,
    Bound,
    CallReport,
    Departing,
    Dispute,
    Expelled,
    Failing,
    Feed,
    Form,
    Hello,
    Inquire,
    Joiners,
    Leaving,
    Left,
    Lost,
    Message,
    Noted,
    Offer,
    Prepare,
    Ready,
    Refused,
    Resume,
    Suspect,
    Verdict,
    Waiting,
    Welcome,
    clip,
    clip_line,
)
from ringps.wire.rules import MAX_CALL_BYTES, Seat
from ringps.worker_env import WorkerEnv

LAST_WORDS_S = 0.5
"""How long a link that closes may take to get its last message out."""
_LAST_QUESTION_S = 1.0

_log = logging.getLogger("ringps")


class Listener(Protocol):
    """Who hears what becomes of the ring.

    Called on the link's own thread, also before `WorkerLink.join` has returned; must return at once.
    """

    def on_lost(self, error: RingpsError) -> None:
        """The ring cannot go on, or not with this worker."""

    def on_changed(self, error: RingChangedError) -> None:
        """Another generation is to form: the current one is over."""

    def on_left(self, rank: int, completed: int) -> None:
        """That rank finished `completed` collectives and called shutdown()."""

    def on_inquiry(self, sequence: int) -> str:
        """What this rank called as collective number `sequence`, or where it is instead."""

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """The answer to a dispute: `calls[rank]` is what that rank called."""


class JobOver(Exception):
    """The job ended before this worker could join it. Not for users."""


class WorkerLink:
    """Takes part in forming generations, says that this worker lives, and hears of the others.

    Messages are noted on the channel's thread; the methods that block are the script's thread's.
    """

    def __init__(self, env: WorkerEnv, timeouts: Timeouts, listener: Listener, *, program: str = "") -> None:
        """
        Args:
            env: this worker.
            timeouts: limits on waiting.
            listener: hears what happens.
            program: names the script by its contents.

        Raises:
            SetupError: the job key cannot be read.
        """
        self._env = env
        self._timeouts = timeouts
        self._listener = listener
        self._program = program
        key = None if env.key_file is None else JobKey.load(env.key_file)
        self._channel = ControlChannel(env.coordinator, key, timeouts, TO_WORKER, self)
        self._rendezvous = Rendezvous(self._channel, timeouts)
        self._session = new_session()
        self._step = 0
        self._changed = threading.Condition()
        self._generation = 0
        """The newest in which this worker is a member: all of its members have been told to connect."""
        self._members: tuple[Member, ...] = ()
        self._welcome: Welcome | None = None
        self._prepare: Prepare | None = None
        self._form: Form | None = None
        self._formed: Prepare | None = None
        """The one that the newest generation of this worker came of."""
        self._feed: Feed | None = None
        self._resumed: Resume | None = None
        self._joiners: Joiners | None = None
        self._admitting = self._ready = False
        self._left: set[int] = set()
        self._all_left = False
        self._end: RingpsError | None = None
        """Why there is no ring for this worker any more."""
        self._gone = self._ended = False
        self._away: CoordinatorUnreachableError | None = None

    # Becoming a member.

    @property
    def elastic(self) -> bool:
        """Whether the ring goes on when a member is lost; known once `join` has returned."""
        return self._welcome is not None and self._welcome.elastic

    @property
    def least(self) -> int:
        """With how many members an elastic ring still goes on."""
        return 1 if self._welcome is None else max(1, self._welcome.min_workers)

    @property
    def running(self) -> int:
        """How many members the ring has that this worker is to join; 0 for a first formation."""
        return 0 if self._welcome is None else self._welcome.running

    def join(self, bind: Callable[[JobKey, bool], str]) -> Generation | None:
        """Take part in forming the ring; blocks until it is formed.

        Args:
            bind: called with a generation's token and whether data must be encrypted; returns the address
                where this worker's data socket then listens. Called again if another generation takes the
                place of one that has not formed yet.

        Returns:
            The generation; None if a ring runs already, which this worker is to join by `ready`.

        Raises:
            CoordinatorUnreachableError: nobody answers at the coordinator's address.
            AuthenticationError: the coordinator holds another key.
            RefusedError: it does not take this worker, and why.
            PeerLostError: a worker died before the ring was formed.
            SetupError: workers did not come within `rendezvous_timeout_s`; the message names them.
            ClosedError: `close` was called meanwhile.
        """
        self._rendezvous.greet(self._hello(), Welcome)
        return self._form_next(bind, "the ring did not form", self._timeouts.rendezvous_timeout_s)

    def next_generation(self, bind: Callable[[JobKey, bool], str]) -> Generation:
        """Take part in forming a generation after the current one; blocks until it is formed.

        Waits for a coordinator that is away, and for members that are busy.

        Raises:
            PeerLostError: too few members are left.
            ExpelledError: the others went on without this worker.
            RefusedError: likewise, and the coordinator does not know this worker any more.
            SetupError: nothing has come of it for as long as `rendezvous_timeout_s` and `op_timeout_s` allow.
            ClosedError: `close` was called meanwhile.
        """
        limit_s = max(self._timeouts.rendezvous_timeout_s, self._timeouts.op_timeout_s)
        view = self._form_next(bind, "no new generation formed", limit_s)
        assert view is not None
        return view

    def check(self) -> None:
        """Raise if the generation whose members are connecting is not to be any more.

        Raises:
            RingChangedError: another one takes its place.
            RingpsError: the ring has ended.
        """
        with self._changed:
            if self._end is not None:
                raise self._end
            if self._prepare is not None and self._prepare is not self._formed:
                raise RingChangedError(self._prepare.reason)

    def _form_next(self, bind: Callable[[JobKey, bool], str], goal: str, limit_s: float) -> Generation | None:
        deadline_s = time.monotonic() + limit_s
        while True:
            prepare = self._wait_for(self._newer, deadline_s)
            if prepare is None:
                return None
            if prepare is False:
                self._give_up(goal, limit_s)
            number = prepare.generation
            if probe.listener is not None:
                probe.reached("prepare", generation=number)
            address = bind(
                JobKey(prepare.token_public.encode(), prepare.token_secret.encode()), prepare.encrypt
            )
            self._channel.send(Bound(generation=number, address=address))
            if probe.listener is not None:
                probe.reached("bound", generation=number)

            def formed_or_replaced(prepare: Prepare = prepare) -> Form | Prepare | bool:
                if self._prepare is not None and self._prepare is not prepare:
                    return self._prepare
                formed = self._form is not None and self._form.generation == prepare.generation
                return self._form or False if formed else False

            answer = self._wait_for(formed_or_replaced, deadline_s)
            if answer is False:
                self._give_up(goal, limit_s)
            if isinstance(answer, Form):
                return self._enter(prepare, answer)

    def _newer(self) -> Prepare | bool | None:
        """A generation that is to form; None for a ring that runs without us; False to wait on."""
        if self._replaced():
            return self._prepare
        if self._generation == 0 and not self._ready and self.running:
            return None
        return False

    def _enter(self, prepare: Prepare, form: Form) -> Generation:
        if len(form.addresses) != len(prepare.members):
            raise SetupError("the coordinator formed another ring than it had prepared")
        members = tuple(
            Member(worker_id=seat.worker_id, host=seat.host, address=address, pid=seat.pid)
            for seat, address in zip(prepare.members, form.addresses, strict=True)
        )
        ranks = [rank for rank, seat in enumerate(members) if seat.worker_id == self._env.worker_id]
        if len(ranks) != 1:
            raise SetupError("the coordinator formed a ring without us")
        with self._changed:
            self._members, self._generation, self._formed = members, form.generation, prepare
            self._left, self._ready, self._feed, self._resumed = set(), False, None, None
        self._greet_anew()
        return Generation(number=form.generation, members=members, rank=ranks[0])

    # Between two steps.

    @property
    def joiners(self) -> tuple[int, ...]:
        """Worker ids that are ready to join."""
        told = self._joiners
        return told.worker_ids if told is not None and told.generation == self._generation else ()

    def admit(self) -> None:
        """This worker's script takes new members between its steps from now on."""
        if not self._admitting:
            self._admitting = True
            self._greet_anew()
            self._channel.send(Admitting(generation=self._generation))

    def offer(self, step: int, joiners: tuple[int, ...], address: str) -> bool:
        """Say that this member pauses after `step` and serves its state, and wait for what follows.

        Returns:
            Whether another generation is to form; if not, nobody joins now.

        Raises:
            RingpsError: the ring has ended.
        """
        generation = self._generation
        self._set(_resumed=None)
        self._channel.send(Offer(generation=generation, step=step, joiners=joiners, address=address))

        def decided() -> str | bool:
            if self._replaced():
                return "changed"
            over = self._resumed is not None and self._resumed.generation >= generation
            return "as before" if over or self._gone else False

        limit_s = 2 * self._timeouts.feed_timeout_s
        return bool(self._wait_for(decided, time.monotonic() + limit_s) == "changed")

    def depart(self, step: int) -> None:
        """Say that this member leaves after `step`, and close the link."""
        self._channel.send(Departing(generation=self._generation, step=step))
        self.close()

    def wait_for_feed(self) -> Feed:
        """As a joining worker: say that its model is built, and wait until members serve their state and are
        about to form a generation with it.

        Raises:
            JobOver: the job is done.
            RingpsError: the coordinator refuses this worker, or the ring has ended.
        """
        self._set(_feed=None, _ready=True)
        self._greet_anew()
        self._channel.send(Ready())
        feed: Feed = self._wait_for(lambda: self._feed or False)
        return feed

    # While a ring lasts.

    def suspect(self, generation: int, worker_id: int, reason: str, *, forming: bool) -> None:
        """That member cannot be reached over the data connections of `generation`. Any thread.

        Args:
            generation: the one whose connections they are.
            worker_id: the member.
            reason: in words.
            forming: it was never met; else a connection to it broke.
        """
        suspect = Suspect(generation=generation, worker_id=worker_id, forming=forming, reason=clip(reason))
        self._channel.send(suspect)

    def note(self, event: dict[str, Any]) -> None:
        """Have a line written to the events file. Any thread."""
        self._channel.send(Noted(event=event))

    def dispute(self, sequence: int) -> None:
        """Ranks seem to disagree on collective `sequence`; `on_verdict` comes on all members. Any thread."""
        self._channel.send(Dispute(generation=self._generation, sequence=sequence))

    def report_step(self, step: int) -> None:
        """How far this rank is; travels with the next heartbeat. Any thread."""
        self._step = step

    def leave(self, completed: int, *, suspended: bool = False) -> None:
        """Say that this rank is done after `completed` collectives, and wait for the others.

        Returns at once if the coordinator is gone: then nobody can say when they are done. Does
        nothing before `join` has returned.

        Args:
            completed: collectives that this rank has finished in this generation.
            suspended: whether it leaves because the job stops at a checkpoint; its process must then exit
                with `worker_env.SUSPENDED_CODE`.

        Raises:
            RingChangedError: a member was lost, and the others form another generation with this worker.
            PeerLostError: a member was lost, and the ring cannot go on.
            TimeoutError: others did not leave within `shutdown_timeout_s`; the message names them.
        """
        if not self._generation:
            return
        leaving = Leaving(generation=self._generation, completed=completed, suspended=suspended)
        self._channel.send(leaving)
        self._greet_anew(leaving)
        with self._changed:
            self._changed.wait_for(
                lambda: self._all_left or self._end or self._gone or self._ended or self._replaced(),
                timeout=self._timeouts.shutdown_timeout_s,
            )
            if self._all_left:
                return
            if self._end is not None:
                raise self._end
            if self._replaced():
                assert self._prepare is not None
                raise RingChangedError(self._prepare.reason)
            if not (self._gone or self._ended):
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

    # Waiting.

    def _wait_for(self, found: Callable[[], Any], deadline_s: float = float("inf")) -> Any:
        """What `found` returns once that is not False, or False at the deadline. It looks with the lock held.

        Raises:
            JobOver, RingpsError: nothing will be found.
        """
        with self._changed:
            while True:
                if self._end is not None:
                    raise self._end
                if self._ended:
                    raise ClosedError("the link to the coordinator was closed")
                if self._all_left:
                    raise JobOver
                if self._gone and not self._generation and not self.running:
                    assert self._away is not None
                    raise self._away
                answer = found()
                left_s = min(deadline_s - time.monotonic(), threading.TIMEOUT_MAX)
                if answer is not False or left_s <= 0:
                    return answer
                self._changed.wait(left_s)

    def _give_up(self, goal: str, limit_s: float) -> NoReturn:
        self._channel.send(Ask())
        try:
            why = self._rendezvous.next(Waiting, _LAST_QUESTION_S).reason
        except (TimeoutError, RingpsError):
            why = "the coordinator does not say why"
        raise SetupError(f"{goal} within {limit_s:g} s: {why}")

    def _replaced(self) -> bool:
        return self._prepare is not None and self._prepare.generation > self._generation

    # Called by the channel, on its thread.

    def on_message(self, message: Any) -> None:
        match message:
            case Welcome(heartbeat_port=port):
                self._channel.start_heartbeat(port, self._make_beat)
                self._rendezvous.deliver(message)
                self._set(_welcome=message)
                if self._gone:
                    self._set(_gone=False)
                    _log.warning("the coordinator at %s is back", self._env.coordinator)
            case Prepare():
                self._on_prepare(message)
            case Form() if message.generation > self._generation:
                self._set(_form=message)
            case Joiners() if message.generation >= self._generation:
                # It may come before this worker has entered the generation that it is about.
                self._set(_joiners=message)
            case Feed():
                self._set(_feed=message)
            case Resume():
                self._set(_resumed=message)
            case Lost():
                self._finish(lost_error(message), message)
            case Expelled(reason=reason):
                rank = next((r for r, m in enumerate(self._members) if m.worker_id == self._env.worker_id), 0)
                self._finish(ExpelledError(reason, rank=rank, worker_id=self._env.worker_id), message)
            case Refused(reason=reason) if self._welcome is not None:
                coordinator = self._env.coordinator
                self._finish(RefusedError(f"the coordinator at {coordinator} refuses us: {reason}"), message)
            case AllLeft():
                self._set(_all_left=True)
            case Left() | Inquire() | Verdict():
                if message.generation == self._generation:
                    self._on_ring(message)
            case Form() | Joiners():
                pass  # of a generation that is over
            case _:
                self._rendezvous.deliver(message)

    def on_gone(self, error: CoordinatorUnreachableError) -> None:
        self._rendezvous.fail(error)
        if self._generation and not (self._all_left or self._end):
            then = (
                "membership changes wait for it"
                if self.elastic
                else ("from now on only the data connections tell when a worker is lost")
            )
            _log.warning("%s; training goes on, and %s", error, then)
        self._set(_gone=True, _away=error)

    def _on_prepare(self, prepare: Prepare) -> None:
        if prepare.generation <= self._generation:
            return  # told again, after a broken connection
        with self._changed:
            # A coordinator that was restarted twice may give out a number again that nothing came of.
            if prepare == self._prepare:
                return
            self._prepare, self._form = prepare, None
            self._changed.notify_all()
        self._listener.on_changed(RingChangedError(prepare.reason))

    def _finish(self, error: RingpsError, message: Message) -> None:
        with self._changed:
            if self._end is not None:
                return
            self._end = error
            self._changed.notify_all()
        self._rendezvous.deliver(message if isinstance(message, Lost) else error)
        self._listener.on_lost(error)

    def _on_ring(self, message: Left | Inquire | Verdict) -> None:
        match message:
            case Left(rank=rank, completed=completed):
                if rank in self._left:
                    return
                with self._changed:
                    self._left.add(rank)
                self._listener.on_left(rank, completed)
            case Inquire(sequence=sequence):
                call = clip_line(self._listener.on_inquiry(sequence), MAX_CALL_BYTES)
                self._channel.send(CallReport(generation=self._generation, sequence=sequence, call=call))
            case Verdict(sequence=sequence, calls=calls):
                self._listener.on_verdict(sequence, calls)

    def _set(self, **changes: Any) -> None:
        with self._changed:
            for name, value in changes.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _make_beat(self, count: int) -> Beat:
        return Beat(
            worker_id=self._env.worker_id,
            session=self._session,
            generation=self._generation,
            step=self._step,
            count=count,
        )

    def _hello(self) -> Hello:
        return Hello(
            worker_id=self._env.worker_id,
            host=clip_line(self._env.host),
            pid=os.getpid(),
            generation=self._generation,
            members=tuple(Seat(member.worker_id, member.host, member.pid) for member in self._members),
            program=self._program,
            session=self._session,
        )

    def _greet_anew(self, *more: Message) -> None:
        """What the coordinator is told should the connection break, or another one take its place."""
        said: list[Message] = [self._hello()]
        if self._admitting and self._generation:
            said.append(Admitting(generation=self._generation))
        if self._ready:
            said.append(Ready())
        self._channel.greet_with(*said, *more)

    def _still_at_work(self) -> str:
        return ", ".join(
            f"rank {rank} (worker {member.worker_id} on {member.host})"
            for rank, member in enumerate(self._members)
            if rank not in self._left and member.worker_id != self._env.worker_id
        )
