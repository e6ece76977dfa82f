"""PURE: a generation from its preparation to its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringps.membership.roster import Phase, Worker
from ringps.wire.control import Form, Left, Lost, Prepare, ToWorker
from ringps.wire.rules import Seat


class Ring:
    """The generation that is being formed or has formed, and what its members were told.

    `number` is 0 while nothing was prepared.
    """

    def __init__(self) -> None:
        self.number = 0
        self.members: Sequence[Worker] = ()
        self.lost: Lost | None = None
        self._prepare: Prepare | None = None
        self._form: Form | None = None

    @property
    def formed(self) -> bool:
        """Whether all members were told to connect."""
        return self._form is not None

    @property
    def all_left(self) -> bool:
        """Whether it has formed and every member has called shutdown()."""
        return self.formed and all(worker.phase is Phase.LEFT for worker in self.members)

    def prepare(self, members: Sequence[Worker], token: tuple[str, str], encrypt: bool) -> Prepare:
        """Begin the next generation with these members, in ring order."""
        self.number += 1
        self.members = members
        for rank, worker in enumerate(members):
            worker.rank, worker.phase = rank, Phase.PREPARED
        self._prepare = Prepare(
            generation=self.number,
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
        addresses = tuple(worker.address for worker in self.members)
        self._form = Form(generation=self.number, addresses=addresses)
        return self._form

    def left(self, worker: Worker) -> Left:
        """What the others are told when a member has left."""
        assert worker.rank is not None
        return Left(generation=self.number, rank=worker.rank, completed=worker.completed)

    def history(self, worker: Worker) -> list[ToWorker]:
        """All that a member was told of its generation so far, for one that may have missed it."""
        if worker not in self.members:
            return []
        told: list[ToWorker | None] = [self._prepare, self._form]
        others = (other for other in self.members if other is not worker)
        told += [self.left(other) for other in others if other.phase is Phase.LEFT]
        return [message for message in told if message is not None]

    def describe(self) -> list[dict[str, Any]]:
        """The members, for the events file."""
        return [
            {"rank": rank, "worker_id": worker.worker_id, "host": worker.host, "pid": worker.pid}
            for rank, worker in enumerate(self.members)
        ]
