"""Every exception that ringps raises on purpose.

::

    RingpsError
    ├── SetupError                      the job or the ring could not start
    │   ├── AddressInUseError           another process listens where we were told to listen
    │   ├── CoordinatorUnreachableError nobody answers at the coordinator's address
    │   ├── AuthenticationError         the other side holds another job key
    │   └── RefusedError                the coordinator answered and said no, with its reason
    ├── RingBrokenError                 the ring cannot go on as it is
    │   ├── PeerLostError               a member died, froze or became unreachable
    │   ├── PeerLeftError               a member called shutdown() while others still needed it
    │   └── ExpelledError               the others took this worker for lost, and went on without it
    ├── RingChangedError                another generation is to form; always caught inside
    ├── DivergedError                   ranks hold different bits where all must hold the same
    ├── CollectiveError
    │   ├── CollectiveMismatchError     ranks called different collectives
    │   ├── CollectiveTimeoutError      a collective made no progress for op_timeout_s
    │   └── LayoutMismatchError         the ranks' models differ
    ├── CheckpointError                 a checkpoint cannot be saved or restored
    ├── FrameError                      bytes from the wire that do not follow the protocol
    └── ClosedError                     you used something after you closed it

A user's mistake in an argument is a plain ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations


class RingpsError(Exception):
    """Base of all errors below."""


class SetupError(RingpsError):
    """The job or the ring could not start; the message says what to do."""


class AddressInUseError(SetupError):
    """The address to listen on is taken by another process."""


class CoordinatorUnreachableError(SetupError):
    """Nobody answers at the coordinator's address."""


class AuthenticationError(SetupError):
    """The other side refused our job key, or does not hold it."""


class RefusedError(SetupError):
    """The coordinator refused this worker or launcher; the message is its reason."""


class RingBrokenError(RingpsError):
    """A member is gone. `blames` is its worker id."""

    def __init__(self, message: str, *, rank: int, worker_id: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.blames = worker_id


class PeerLostError(RingBrokenError):
    """A member died, froze or became unreachable."""

    def __init__(self, *, rank: int, worker_id: int, host: str, reason: str) -> None:
        super().__init__(
            f"rank {rank} (worker {worker_id} on {host}) lost: {reason}",
            rank=rank,
            worker_id=worker_id,
        )
        self.host = host
        self.reason = reason


class PeerLeftError(RingBrokenError):
    """A member called shutdown() (or its script ended) while others still needed it."""


class ExpelledError(RingBrokenError):
    """The others took this worker for lost (frozen, or cut off) and went on without it."""


class RingChangedError(RingpsError):
    """The coordinator forms another generation. Always caught inside: what was under way is done again."""


class DivergedError(RingpsError):
    """Ranks hold different bits where all must hold the same. `worker_ids` names whose are wrong; it is
    empty if that cannot be told."""

    def __init__(self, message: str, *, worker_ids: tuple[int, ...]) -> None:
        super().__init__(message)
        self.worker_ids = worker_ids


class CollectiveError(RingpsError):
    """A collective did not come to its result on this rank."""


class CollectiveMismatchError(CollectiveError):
    """Ranks called different collectives; the message lists what each called."""


class CollectiveTimeoutError(CollectiveError):
    """A collective made no progress for `op_timeout_s`; the message lists where each rank is. `late` are the
    ranks that have not come to it."""

    def __init__(self, message: str, *, late: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.late = late


class LayoutMismatchError(CollectiveError):
    """The ranks' models differ; the message names the first parameter that does."""


class CheckpointError(RingpsError):
    """A checkpoint cannot be saved or restored; the message names it, and says why."""


class FrameError(RingpsError):
    """Bytes from the wire that do not follow the protocol. Always caught and counted inside."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ClosedError(RingpsError):
    """The ring was shut down by this process, or was never joined."""
