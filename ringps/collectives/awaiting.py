"""The ring as a joining worker sees it before it is a member."""

from __future__ import annotations

import os
from typing import NoReturn

import torch

from ringps.collectives.backend import EngineStatistics, Work
from ringps.collectives.handle import Handle
from ringps.errors import ClosedError, RingpsError
from ringps.ring.topology import Generation, Member
from ringps.worker_env import WorkerEnv


def prospect(env: WorkerEnv, running: int) -> Generation:
    """The generation that might be once this worker has joined `running` members: it comes last."""
    ids = [worker_id for worker_id in range(running + 1) if worker_id != env.worker_id][:running]
    others = tuple(Member(worker_id=worker_id, host="", address="") for worker_id in ids)
    own = Member(worker_id=env.worker_id, host=env.host, address="", pid=os.getpid())
    return Generation(number=1, members=(*others, own), rank=running)


class AwaitingBackend:
    """A `collectives.backend.Backend` that gives out memory and carries out nothing."""

    def run(self, work: Work) -> None:
        self._refuse()

    def start(self, work: Work) -> Handle:
        self._refuse()

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Ordinary memory: there are no peers yet."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def fail(self, error: RingpsError) -> None:
        """Nothing is under way."""

    def peer_left(self, rank: int, completed: int) -> None:
        """Nothing is under way."""

    def verdict(self, sequence: int, calls: tuple[str, ...]) -> None:
        """Nothing is under way."""

    def describe(self, sequence: int) -> str:
        return "not a member yet"

    def drain(self) -> None:
        """Nothing is under way."""

    @property
    def completed(self) -> int:
        return 0

    def close(self) -> None:
        """Holds nothing."""

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(0, {}, None)

    def _refuse(self) -> NoReturn:
        raise ClosedError("this worker is not a member of the ring yet")
