"""PURE: a generation from its preparation to its end, and its successors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringps.membership.roster import SEATED, Phase, Worker
from ringps.wire.control import Form, Left, Lost, Prepare, ToWorker, clip
from ringps.wire.rules import Seat


class Ring:
    """The generation that is being formed or has formed, and what its members were told.

    `number` is 0 while nothing was prepared. `reason` says why there is this generation.
    """

    def __init__(self) -> None:
        self.number = 0
        self.members: Sequence[Worker] = ()
        self.reason = ""
        self.lost: Lost | None = None
        self.formed = False
        """Whether all members were told to connect."""
        self.formed_once = False
        """Whether any generation was."""
        self.formed_of: Sequence[Worker] = ()
        """The members of the last generation that was."""
        self.token: tuple[str, str] | None = None
        """Of this generation; None if another coordinator gave it out."""
        self._floor = 0
        self._prepare: Prepare | None = None
        self._form: Form | None = None

    @property
    def all_left(self) -> bool:
        """Whether it has formed and every member has called shutdown()."""
        return self.formed and all(
            worker.phase is Phase.LEFT and not worker.departed for worker in self.members
        )

    @property
    def remaining(self) -> list[Worker]:
        """The members that neither left nor are gone, in rank order."""
        return [worker for worker in self.members if worker.phase in SEATED]

    @property
    def has_majority(self) -> bool:
        """Whether most members of the last generation that formed remain: of the parts that a ring was cut
        into, one has them at most."""
        remaining = self.remaining
        return 2 * sum(worker in remaining for worker in self.formed_of) > len(self.formed_of)

    @property
    def bound(self) -> bool:
        """Whether it is prepared, and every member listens."""
        prepared = self.number > 0 and not self.formed
        return prepared and all(worker.phase is Phase.BOUND for worker in self.members)

    def skip_to(self, number: int) -> None:
        """The next generation's number must be above this one."""
        self._floor = max(self._floor, number)

    def prepare(
        self, members: Sequence[Worker], token: tuple[str, str], encrypt: bool, reason: str
    ) -> Prepare:
        """Begin the next generation with these members, in ring order."""
        self.number = max(self.number, self._floor) + 1
        self.members, self.reason, self.token = members, reason, token
        for rank, worker in enumerate(members):
            worker.rank, worker.phase = rank, Phase.PREPARED
        self._form, self.formed = None, False
        self._prepare = Prepare(
            generation=self.number,
            reason=clip(reason),
            members=tuple(Seat(worker.worker_id, worker.host, worker.pid) for worker in members),
            token_public=token[0],
            token_secret=token[1],
            encrypt=encrypt,
        )
        return self._prepare

    def form(self) -> Form:
        """All members listen: they may connect."""
        for worker in self.members:
            worker.phase = Phase.MEMBER
        self.formed = self.formed_once = True
        self.formed_of = self.members
        addresses = tuple(worker.address for worker in self.members)
        self._form = Form(generation=self.number, addresses=addresses)
        return self._form

    def adopt(self, number: int, members: Sequence[Worker], reason: str) -> None:
        """An earlier coordinator formed this generation, and its members hold it still."""
        self.number, self.members, self.reason = number, members, reason
        for rank, worker in enumerate(members):
            worker.rank, worker.phase = rank, Phase.MEMBER
        self.formed = self.formed_once = True
        self.formed_of = members

    def left(self, worker: Worker) -> Left:
        """What the others are told when a member has left."""
        assert worker.rank is not None
        return Left(generation=self.number, rank=worker.rank, completed=worker.completed)

    def history(self, worker: Worker) -> list[ToWorker]:
        """All that a member was told of its generation so far, for one that may have missed it."""
        if worker not in self.members:
            return []
        told: list[ToWorker | None] = [self._prepare, self._form]
        others = (other for other in self.members if other is not worker and not other.departed)
        told += [self.left(other) for other in others if other.phase is Phase.LEFT]
        return [message for message in told if message is not None]

    def describe(self) -> list[dict[str, Any]]:
        """The members, for the events file."""
        return [
            {"rank": rank, "worker_id": worker.worker_id, "host": worker.host, "pid": worker.pid}
            for rank, worker in enumerate(self.members)
        ]
