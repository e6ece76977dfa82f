"""PURE: which worker ids another process could take, and which of them their launchers know of."""

from __future__ import annotations

from collections.abc import Mapping

from ringps.wire.control import Replaceable, clip


class Vacancies:
    """Announces every vacancy once, from when the members' scripts take new workers.

    `wanted` says whether they do.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._told: dict[int, Replaceable] = {}

    def announce(self, vacant: Mapping[int, str]) -> list[Replaceable]:
        """What to tell now. `vacant` are all worker ids that nobody has, each with the reason."""
        if not self.wanted:
            return []
        self._told = {worker_id: told for worker_id, told in self._told.items() if worker_id in vacant}
        new = [
            Replaceable(worker_id=worker_id, reason=clip(reason))
            for worker_id, reason in vacant.items()
            if worker_id not in self._told
        ]
        self._told.update((replaceable.worker_id, replaceable) for replaceable in new)
        return new

    def renew(self, worker_id: int) -> None:
        """The process that was to take this id ended before it said hello: announce it again."""
        self._told.pop(worker_id, None)

    def told(self) -> list[Replaceable]:
        """All that was announced and is still vacant as far as is known."""
        return list(self._told.values())
