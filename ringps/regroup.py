"""From one generation to the next, in this process: the coordinator's word, doors, connections, backends."""

from __future__ import annotations

import threading

from ringps import probe
from ringps.checkpoint.peer import Fetched, fetch
from ringps.checkpoint.state_server import StateServer
from ringps.checkpoint.tree import State
from ringps.collectives.backend import Backend
from ringps.collectives.formation import Doors, Formed, SharedArea
from ringps.config import Config
from ringps.errors import PeerLostError, RingBrokenError, RingChangedError, RingpsError
from ringps.membership import WorkerLink
from ringps.optim.admission import Entrance
from ringps.ring.commit import MOST_JOINERS
from ringps.ring.topology import Generation
from ringps.transport.keys import JobKey
from ringps.wire.control import Feed
from ringps.worker_env import WorkerEnv


class Regroup:
    """This process as a member, now and in later generations.

    A `membership.Listener`, whose methods the link's thread calls; a `collectives.Membership` and an
    `optim.Admission`, whose methods the script's thread calls.
    """

    def __init__(self, env: WorkerEnv, config: Config, program: str) -> None:
        """
        Args:
            env: this worker.
            config: settings.
            program: names the script by its contents.

        Raises:
            SetupError: the job key cannot be read.
        """
        self._env = env
        self._config = config
        self._area = SharedArea()
        self.link = WorkerLink(env, config.timeouts, self, program=program)
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._over: RingpsError | None = None
        """Why collectives end, also those of a backend that is yet to come."""
        self._doors: Doors | None = None
        self._token: JobKey | None = None
        self._view: Generation | None = None
        self._server: StateServer | None = None
        self._leaving = False
        self.departed = False
        """This worker has left the ring in order, before the others."""
        self.suspended = False
        """The job stops at a checkpoint, and its last members leave because of that."""

    @property
    def backend(self) -> Backend | None:
        """The current one."""
        return self._backend

    def first(self) -> tuple[Generation, Formed] | None:
        """Take part in the first formation; None if a ring runs already.

        Raises:
            RingpsError: as `WorkerLink.join` and `Doors.form`.
        """
        view = self.link.join(self._bind)
        if view is None:
            return None
        if self.link.elastic:
            return self._form(view)
        assert self._doors is not None
        try:
            formed = self._doors.form(view, self.link, self._check_lost)
        except BaseException:
            self._doors.close()
            raise
        self._attach(view, formed.backend)
        return view, formed

    def close(self) -> None:
        """Give up all connections."""
        self.withdraw()
        if self._doors is not None:
            self._doors.close()
        if self._backend is not None:
            self._backend.close()
        self._area.close()
        self.link.close()

    # collectives.Membership

    def reform(self, error: RingpsError) -> tuple[Generation, Backend]:
        old, view = self._backend, self._view
        assert old is not None and view is not None
        if isinstance(error, PeerLostError):
            # Said before the connections close, which others will complain about.
            self.link.suspect(view.number, error.blames, error.reason, forming=False)
        old.fail(error)
        old.close()
        view, formed = self._form(self.link.next_generation(self._bind))
        return view, formed.backend

    def joiners(self) -> tuple[int, ...]:
        return self.link.joiners[:MOST_JOINERS]

    def leaving(self) -> bool:
        return self._leaving

    def note(self, event: str, **details: object) -> None:
        self.link.note({"event": event, **details})

    # optim.Admission

    def admit(self) -> None:
        self.link.admit()

    def offer(self, step: int, joiners: tuple[int, ...], state: State) -> bool:
        assert self._token is not None
        self.withdraw()
        self._server = StateServer(self._env.address, self._token)
        self._server.offer(state.skeleton, state.tensors, step)
        try:
            changed = self.link.offer(step, joiners, self._server.address)
        except BaseException:
            self.withdraw()
            raise
        if not changed:
            self.withdraw()
        return changed

    def withdraw(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def join(self) -> Entrance:
        feed = self.link.wait_for_feed()
        view, formed = self._form(self.link.next_generation(self._bind))
        return Entrance(view, formed.backend, lambda: self._fetch(feed))

    def depart(self, step: int) -> None:
        self.departed = True
        self.link.depart(step)
        if self._backend is not None:
            self._backend.close()

    def ask_to_leave(self) -> None:
        self._leaving = True

    def suspend(self) -> None:
        self.suspended = True

    def _fetch(self, feed: Feed) -> Fetched:
        token = JobKey(feed.token_public.encode(), feed.token_secret.encode())
        timeouts = self._config.timeouts
        return fetch(feed.servers, token, feed.step, timeouts=timeouts, check=self._check_lost)

    # membership.Listener

    def on_changed(self, error: RingChangedError) -> None:
        self._end(error)

    def on_lost(self, error: RingpsError) -> None:
        self._end(error)

    def on_left(self, rank: int, completed: int) -> None:
        if self._backend is not None:
            self._backend.peer_left(rank, completed)

    def on_inquiry(self, sequence: int) -> str:
        return self._backend.describe(sequence) if self._backend is not None else "no ring yet"

    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        if self._backend is not None:
            self._backend.verdict(sequence, calls)

    def _end(self, error: RingpsError) -> None:
        with self._lock:
            self._over = error
            backend = self._backend
        if backend is not None:
            backend.fail(error)

    # Forming.

    def _bind(self, token: JobKey, encrypt: bool) -> str:
        if self._doors is not None:
            self._doors.close()
        self._token = token
        self._doors = Doors(
            self._env,
            token,
            self._config,
            encrypt=encrypt,
            area=self._area,
            elastic=self.link.elastic,
        )
        return self._doors.address

    def _form(self, view: Generation) -> tuple[Generation, Formed]:
        """Connect to the members of `view`, or of whatever generation takes its place."""
        while True:
            assert self._doors is not None
            try:
                formed = self._doors.form(view, self.link, self.link.check)
                self._attach(view, formed.backend)
                self.link.check()
                if probe.listener is not None:
                    probe.reached("connected", generation=view.number)
                return view, formed
            except RingChangedError:
                pass
            except PeerLostError as lost:
                self.link.suspect(view.number, lost.blames, lost.reason, forming=True)
            self._doors.close()
            if self._backend is not None:
                self._backend.close()
            view = self.link.next_generation(self._bind)

    def _attach(self, view: Generation, backend: Backend) -> None:
        with self._lock:
            self._view, self._backend = view, backend
            over = self._over
            self._over = None if isinstance(over, RingChangedError) else over
        if over is not None and not isinstance(over, RingChangedError):
            backend.fail(over)

    def _check_lost(self) -> None:
        if self._over is not None and not isinstance(self._over, RingChangedError):
            raise self._over


def blamed(error: BaseException) -> int | None:
    """The worker at fault for an error, if it is another one."""
    return error.blames if isinstance(error, RingBrokenError) else None
