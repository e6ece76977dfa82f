"""PURE: finding a good bucket size by trying a few on the first steps.

Small buckets start early and overlap better; large ones cost less per byte. Which effect is stronger
depends on the model, the machine and the links, so sizes are tried, each for a few passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

MIB = 1024 * 1024
CANDIDATES_BYTES = (2 * MIB, 8 * MIB, 25 * MIB, 64 * MIB)
PASSES_EACH = 4
"""The first one with a new layout is not counted: it touches new memory."""


class CapTuner:
    """Says which cap to use for each pass, and takes down how long the pass took."""

    def __init__(
        self, total_bytes: int, candidates: Sequence[int] = CANDIDATES_BYTES, passes_each: int = PASSES_EACH
    ) -> None:
        """
        Args:
            total_bytes: all gradients; candidates that would put them all into one bucket count as one.
            candidates: caps to try, ascending.
            passes_each: passes with each of them, at least 2.
        """
        enough = [cap for cap in candidates if cap >= total_bytes][:1]
        self.candidates = tuple([cap for cap in candidates if cap < total_bytes] + enough) or (
            candidates[-1],
        )
        self._passes_each = passes_each
        self._durations_s: list[list[float]] = [[] for _ in self.candidates]
        self._at = 0

    @property
    def cap_bytes(self) -> int:
        """The cap to use for the next pass."""
        return self.candidates[min(self._at, len(self.candidates) - 1)]

    @property
    def tried(self) -> bool:
        """Every candidate has had its passes."""
        return self._at == len(self.candidates)

    def record(self, duration_s: float) -> bool:
        """A pass took so long on this rank. Returns whether the next one needs another layout."""
        durations_s = self._durations_s[self._at]
        durations_s.append(duration_s)
        if len(durations_s) < self._passes_each:
            return False
        self._at += 1
        return True

    def durations_s(self) -> list[float]:
        """Each candidate's median duration on this rank."""
        return [median(one[1:]) for one in self._durations_s]

    def choose(self, slowest_s: Sequence[float]) -> tuple[int, str]:
        """The best cap, and the reason.

        Args:
            slowest_s: each candidate's duration on the rank where it took longest, equal on all ranks.
        """
        best = min(range(len(slowest_s)), key=lambda at: slowest_s[at])
        tried = ", ".join(
            f"{cap / MIB:g} MiB {duration_s * 1e3:.1f} ms"
            for cap, duration_s in zip(self.candidates, slowest_s, strict=True)
        )
        return self.candidates[best], f"backward with reduction by bucket size: {tried}"
