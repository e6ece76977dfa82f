"""PURE: a coordinator that was restarted takes over the ring of the one before it.

Links make their connections again by themselves, and say hello with the generation that they are
in. Until it is clear which ring there is (`returning`), nothing is formed, and what members and
launchers report is kept; it is acted upon as if it came right after.
"""

from __future__ import annotations

from ringps.membership.admission import member_adopted_as
from ringps.membership.catching_up import catch_up
from ringps.membership.ending import Ending
from ringps.membership.returning import NUMBERS_SKIPPED, Adoption, Returned, Returning
from ringps.membership.roster import Phase, Worker
from ringps.membership.state import JobState
from ringps.membership.succession import Succession
from ringps.wire.control import (
    Ask,
    Expelled,
    FromLauncher,
    FromWorker,
    Hello,
    Leaving,
    Ready,
    Refused,
    Waiting,
    WorkerExited,
    clip,
)
from ringps.wire.rules import Seat

RETURN_PATIENCE_S = 30.0
"""Of pods: how long a member may take to come back to a coordinator that was restarted, unless the cluster
says that it is gone."""


class Restoration:
    """What happens between the start of a coordinator and its first generation, if that is not the first."""

    def __init__(self, state: JobState, succession: Succession, ending: Ending) -> None:
        self._state = state
        self._succession = succession
        self._ending = ending
        self._returning = Returning()
        self._adopted = False
        self._exits_kept_until_s = float("-inf")

    @property
    def under_way(self) -> bool:
        """Whether something is kept, so that no ring may form anew."""
        return bool(self._returning) or self._returning.keeps_exits

    @property
    def waits_for(self) -> str:
        """Who must come back, in words."""
        return self._returning.decide(self._is_gone)[1]

    # What is reported meanwhile. The answer is None, or the reason for refusing it.

    def concerns(self, hello: Hello) -> bool:
        """Whether this is the hello of one that may come back."""
        state = self._state
        if state.ring.lost is not None:
            return False
        if 0 < hello.generation < state.settings.first_generation:
            return False  # of an earlier start of the ring, which is over for good
        if self._adopted:
            # A fresh process may be a member too: one that did not hear that its generation formed.
            member = member_adopted_as(state, hello) if hello.session not in state.peers else None
            return member is not None or hello.generation > 0
        return hello.generation > 0 and state.ring.number == 0

    def take(self, peer: bytes, hello: Hello, now_s: float) -> str | None:
        """One that may come back says hello."""
        state = self._state
        if self._adopted:
            member = member_adopted_as(state, hello) if hello.session not in state.peers else None
            if member is None:
                state.out.send(peer, self._over(hello))
                return "generation is over"
            self._attach(member, Returned(peer, hello), now_s)
            return None
        if hello.session in state.peers and hello.session not in self._returning:
            return "session taken"
        reason = self._returning.take(peer, hello)
        if reason is not None:
            state.out.send(peer, Refused(reason=reason))
            return reason
        state.peers.write_down(hello.session, peer)
        state.out.send(peer, Waiting(reason=clip(self.waits_for)))
        return None

    def forget(self, worker: Worker) -> bool:
        """A new process is gone that only waits for the ring to be back; whether it is one. The ring must
        not end with it."""
        state = self._state
        if state.ring.number or worker.phase is not Phase.WAITING or not self._awaits_ring:
            return False
        state.peers.cross_out(worker.session)
        state.detector.forget(worker.worker_id)
        state.roster.drop(worker)
        return True

    def bury(self, host: str) -> None:
        """This machine is gone, and with it whoever came back from there."""
        for entry in self._returning.drop(host):
            self._state.peers.cross_out(entry.hello.session)

    def holds(self, session: str | None) -> bool:
        """Whether this one came back, and the ring is not there yet."""
        return session in self._returning

    def hold(self, peer: bytes, session: str | None, message: FromWorker | FromLauncher) -> str | None:
        """One that came back says more."""
        if isinstance(message, Ask):
            self._state.out.send(peer, Waiting(reason=clip(self.waits_for)))
            return None
        return self._returning.hold(session or "", message)

    def early_ready(self, worker: Worker) -> str | None:
        """A new process says again that it is ready to join: a ring that is not there yet."""
        if not (self._state.plan.restored or self._returning):
            return "message out of turn"
        worker.ready = True
        return None

    def launcher_came(self, now_s: float) -> None:
        """A launcher was let in; it may show that there was a coordinator before."""
        state = self._state
        if state.plan.restored and state.ring.number == 0:
            state.ring.skip_to(NUMBERS_SKIPPED)
            self._exits_kept_until_s = now_s + state.settings.timeouts.heartbeat_timeout_s

    def keeps_exits(self, now_s: float) -> bool:
        """Whether it is open if there was a ring, so that an exit cannot be judged yet."""
        return self._state.ring.number == 0 and (bool(self._returning) or now_s < self._exits_kept_until_s)

    def keep_exit(self, exited: WorkerExited) -> str | None:
        """A launcher reports an exit."""
        return self._returning.keep_exit(exited)

    def take_exits(self, now_s: float) -> list[WorkerExited]:
        """The exits that can be judged now."""
        return [] if self.keeps_exits(now_s) else self._returning.take_exits()

    # Taking over.

    def take_over(self, now_s: float) -> list[tuple[bytes, FromWorker | FromLauncher]]:
        """Take the ring over, if enough are back; what was kept until then, and from which peer."""
        state = self._state
        world_size = state.plan.world_size
        if state.ring.number or state.ring.lost is not None or world_size is None:
            return []
        adoption, _ = self._returning.decide(self._is_gone)
        if adoption is None:
            return []
        returned = self._returning.take_all()
        if any(seat.worker_id >= world_size for seat in adoption.members):
            for entry in returned:
                reason = f"your ring has worker ids that are not among 0..{world_size - 1}, those of this job"
                state.out.send(entry.peer, Refused(reason=reason))
                state.peers.cross_out(entry.hello.session)
            return []
        ends = {seat.worker_id: end for seat in adoption.members if (end := self._end_of(seat)) is not None}
        waiting = self._take_waiting()
        self._adopt(adoption, now_s)
        for entry in returned:
            self._take_back(entry, now_s)
        for worker_id, reason in ends.items():
            self._bury_member(worker_id, reason, now_s)
        return waiting + [(entry.peer, message) for entry in returned for message in entry.held]

    @property
    def _awaits_ring(self) -> bool:
        return self.under_way or self._state.plan.restored

    def _end_of(self, seat: Seat) -> str | None:
        """Of pods: why this member is gone for certain. Where a new process has its id, the one before it
        was taken away, or it is another one in the same pod."""
        state = self._state
        if not (state.settings.pods and state.surroundings.fenced):
            return None
        end = state.surroundings.end_of(seat.host)
        new = state.roster.get(seat.worker_id)
        if end is not None or new is None or new.phase is not Phase.WAITING:
            return end
        if (new.host, new.pid) == (seat.host, seat.pid):
            return None
        return f"process {new.pid} on {new.host} has come in its place"

    def _is_gone(self, seat: Seat) -> bool:
        return self._end_of(seat) is not None

    def _bury_member(self, worker_id: int, reason: str, now_s: float) -> None:
        """It cannot come back."""
        member = self._state.roster[worker_id]
        if member.session or member.phase is not Phase.MEMBER:
            return  # it did, or its launcher told of its end
        if self._state.survives:
            self._succession.lose(member, reason, now_s, code=1)
        else:
            self._ending.blame(member, reason, now_s, code=1)
            self._ending.lose(member, reason)

    def _adopt(self, adoption: Adoption, now_s: float) -> None:
        state, timeouts = self._state, self._state.settings.timeouts
        members = [state.roster.restore(seat) for seat in adoption.members]
        self._adopted = True
        state.ring.adopt(adoption.generation, members, adoption.reason)
        state.ring.skip_to(adoption.generation + NUMBERS_SKIPPED)
        # Pods find a coordinator at another address than before, through names that are looked up anew.
        patience_s = RETURN_PATIENCE_S if state.settings.pods else timeouts.heartbeat_timeout_s
        for worker in members:
            state.detector.watch(worker.worker_id, now_s, patience_s=patience_s)
        self._succession.await_unheard(now_s + patience_s)
        state.emit(
            "coordinator_restored",
            generation=adoption.generation,
            members=state.ring.describe(),
            reason=adoption.reason,
        )

    def _take_waiting(self) -> list[tuple[bytes, FromWorker | FromLauncher]]:
        """New processes that came before the ring; they are to say hello to it."""
        state = self._state
        said: list[tuple[bytes, FromWorker | FromLauncher]] = []
        for worker in state.roster.inside({Phase.WAITING}):
            peer = state.peers.peer_of(worker.session)
            assert peer is not None and worker.program is not None
            hello = Hello(
                worker_id=worker.worker_id,
                host=worker.host,
                pid=worker.pid,
                generation=0,
                members=(),
                program=worker.program,
                session=worker.session,
            )
            said.append((peer, hello))
            if worker.ready:
                said.append((peer, Ready()))
            state.peers.cross_out(worker.session)
            state.detector.forget(worker.worker_id)
            state.roster.drop(worker)
        return said

    def _take_back(self, entry: Returned, now_s: float) -> None:
        state, hello = self._state, entry.hello
        state.peers.cross_out(hello.session)
        member = member_adopted_as(state, hello)
        leaving = next((said for said in entry.held if isinstance(said, Leaving)), None)
        if member is not None:
            self._attach(member, entry, now_s)
        elif leaving is not None and state.roster.taken(hello.worker_id) is None:
            # Its script was done in an earlier generation; it waits for the others.
            entry.held.clear()
            state.peers.write_down(hello.session, entry.peer)
            worker = state.roster.admit(hello, Phase.LEFT)
            worker.completed, worker.suspended = leaving.completed, leaving.suspended
            catch_up(state, self._succession, worker)
        else:
            entry.held.clear()
            state.out.send(entry.peer, self._over(hello))

    def _attach(self, member: Worker, entry: Returned, now_s: float) -> None:
        state, hello, ring = self._state, entry.hello, self._state.ring
        state.roster.attach(member, hello)
        state.peers.write_down(hello.session, entry.peer)
        state.detector.watch(hello.worker_id, now_s)
        catch_up(state, self._succession, member)
        agrees = hello.generation == ring.number if ring.formed else hello.generation < ring.number
        if agrees:
            return
        ring.skip_to(hello.generation + NUMBERS_SKIPPED)
        reason = f"{member.name} is back from generation {hello.generation}, not {ring.number}"
        if state.survives:
            self._succession.disturb(reason, now_s)
        else:
            self._ending.blame(member, reason, now_s, code=1)
            self._ending.lose(member, reason)

    def _over(self, hello: Hello) -> Expelled:
        number = self._state.ring.number
        reason = (
            f"generation {hello.generation} is over, the ring is at {number} and process {hello.pid} "
            "is no member of it; start a new one"
        )
        return Expelled(generation=number, reason=reason)
