"""What a training loop needs of the ring to let members come and go between two steps.

In a fixed ring nobody comes and goes: there `suspend` and `note` alone are of use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ringps.checkpoint.peer import Fetched
from ringps.checkpoint.tree import State
from ringps.collectives.backend import Backend
from ringps.ring.topology import Generation


@dataclass(frozen=True)
class Entrance:
    """The generation in which this worker is a member for the first time."""

    generation: Generation
    backend: Backend
    fetch: Callable[[], Fetched]
    """Gets the state that the other members serve, while they are about their next step."""


class Admission(Protocol):
    """This process's part in coming and going. The script's thread calls it, but for `ask_to_leave`."""

    def admit(self) -> None:
        """From now on this script takes new members between its steps."""

    def offer(self, step: int, joiners: tuple[int, ...], state: State) -> bool:
        """Serve this rank's state of `step`, until `withdraw`, to workers that join.

        Returns:
            Whether another generation, with them, is to form; if not, nothing is served any more.
        """

    def withdraw(self) -> None:
        """The state is about to change: serve it no more."""

    def join(self) -> Entrance:
        """As a joining worker: block until this worker is a member.

        Raises:
            JobOver: the job ended before.
            RingpsError: the ring takes this worker no more.
        """

    def depart(self, step: int) -> None:
        """Leave the ring, in order, after this step."""

    def ask_to_leave(self) -> None:
        """Leave after the step that is under way. Any thread, and signal handlers."""

    def suspend(self) -> None:
        """The job stops at a checkpoint: this worker is about to leave because of that."""

    def note(self, event: str, **details: object) -> None:
        """Have a line written to the events file."""


_admission: Admission | None = None


def use(admission: Admission | None) -> None:
    """Make `admission` the one that `current_admission` returns."""
    global _admission
    _admission = admission


def current_admission() -> Admission | None:
    """This process's; None in a ring of one that no launcher started."""
    return _admission
