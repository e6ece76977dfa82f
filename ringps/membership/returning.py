"""PURE: the members of a ring that an earlier coordinator formed come back to a restarted one.

What a coordinator knows is lost with it; the members bring it back. It takes the ring over when
more than half of the members of the newest generation heard of are accounted for: come back, or
ended according to their launchers or their cluster. So of two parts of a ring that was cut in two,
at most one can go on with a coordinator that was restarted. (The earlier one must be gone: it needs
no majority.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ringps.wire.control import FromLauncher, FromWorker, Hello, WorkerExited
from ringps.wire.rules import MAX_WORKERS, Seat

NUMBERS_SKIPPED = 10
"""How many generations the earlier coordinator may have prepared, and told some members of, that none
of those that came back has formed. Their numbers must not be given out again."""

_MAX_WAITING = 2 * MAX_WORKERS
_MAX_HELD = 16
_MAX_EXITS = 4 * MAX_WORKERS


@dataclass
class Returned:
    """A worker that came back, and what else it has said since."""

    peer: bytes
    hello: Hello
    held: list[FromWorker | FromLauncher] = field(default_factory=list)


@dataclass(frozen=True)
class Adoption:
    """The ring as it was."""

    generation: int
    members: tuple[Seat, ...]
    reason: str


class Returning:
    """Collects those that come back, until they are enough."""

    def __init__(self) -> None:
        self._returned: dict[str, Returned] = {}
        self._exits: dict[tuple[int, int], WorkerExited] = {}

    def __bool__(self) -> bool:
        return bool(self._returned)

    def __contains__(self, session: str | None) -> bool:
        return session in self._returned

    def __iter__(self) -> Iterator[Returned]:
        return iter(self._returned.values())

    def take(self, peer: bytes, hello: Hello) -> str | None:
        """A worker came back; None, or the reason for refusing it."""
        if not any(_is(hello, seat) for seat in hello.members):
            return "worker is no member of the ring that it names"
        before = self._returned.get(hello.session)
        if before is not None and before.hello.worker_id != hello.worker_id:
            return "session taken"
        if before is None and len(self._returned) >= _MAX_WAITING:
            return "too many workers come back"
        self._returned[hello.session] = Returned(peer, hello, [] if before is None else before.held)
        return None

    def take_all(self) -> list[Returned]:
        """All that came back, in order; they are no longer collected."""
        returned = list(self._returned.values())
        self._returned.clear()
        return returned

    def hold(self, session: str, message: FromWorker | FromLauncher) -> str | None:
        """It says more: kept until the ring is taken over. None, or the reason for refusing it."""
        held = self._returned[session].held
        if len(held) >= _MAX_HELD:
            return "too many messages before the ring is back"
        held.append(message)
        return None

    def keep_exit(self, exited: WorkerExited) -> str | None:
        """A launcher reports an exit; kept likewise."""
        key = (exited.worker_id, exited.pid)
        if key in self._exits:
            return "exit reported before"
        if len(self._exits) >= _MAX_EXITS:
            return "too many exits before the ring is back"
        self._exits[key] = exited
        return None

    @property
    def keeps_exits(self) -> bool:
        """Whether there are exits that could not be judged yet."""
        return bool(self._exits)

    def take_exits(self) -> list[WorkerExited]:
        """All exits that were kept, in order; they are kept no more."""
        exits = list(self._exits.values())
        self._exits.clear()
        return exits

    def drop(self, host: str) -> list[Returned]:
        """This machine is gone: whoever came back from there, who is no longer collected."""
        dropped = [entry for entry in self if entry.hello.host == host]
        for entry in dropped:
            del self._returned[entry.hello.session]
        return dropped

    def decide(self, gone: Callable[[Seat], bool] = lambda seat: False) -> tuple[Adoption | None, str]:
        """The ring if enough are back, and how many are in words.

        Args:
            gone: whether this member has ended for certain, though no launcher said so.
        """
        if not self._returned:
            return None, "no member has come back yet"
        newest = max(entry.hello.generation for entry in self)
        views = Counter(entry.hello.members for entry in self if entry.hello.generation == newest)
        members = views.most_common(1)[0][0]
        back = sum(any(_is(entry.hello, seat) for entry in self) for seat in members)
        ended = sum(
            ((seat.worker_id, seat.pid) in self._exits or gone(seat))
            and not any(_is(entry.hello, seat) for entry in self)
            for seat in members
        )
        words = f"{back} of {len(members)} members of generation {newest} are back"
        if ended:
            words += f", and {ended} ended meanwhile"
        if 2 * (back + ended) <= len(members):
            return None, f"{words}, a majority is needed"
        return Adoption(newest, members, words), words


def _is(hello: Hello, seat: Seat) -> bool:
    return (hello.worker_id, hello.host, hello.pid) == (seat.worker_id, seat.host, seat.pid)
