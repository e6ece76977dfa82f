"""PURE: what a check of the cluster comes to, as lines for people or as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL, UNSEEN = "ok", "warn", "fail", "unseen"
"""It is fine; something will not work; jobs will not work; it cannot be seen from here."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    level: str
    """One of `OK`, `WARN`, `FAIL`, `UNSEEN`."""
    words: str
    advice: str = ""
    """What to do; may be empty."""


Checked = tuple[str, Finding]
"""Name of the check, and one thing that it found."""


def lines(checked: Sequence[Checked]) -> list[str]:
    """A line for each finding, and one below for what to do."""
    width = max((len(name) for name, _ in checked), default=0)
    found = []
    for name, finding in checked:
        found.append(f"{finding.level.ljust(6)}  {name.ljust(width)}  {finding.words}")
        if finding.advice:
            found.append(f"{' ' * (8 + width)}  -> {finding.advice}")
    return [*found, "", summary(checked)]


def summary(checked: Sequence[Checked]) -> str:
    """The last line."""
    count = {level: sum(finding.level == level for _, finding in checked) for level in (WARN, FAIL, UNSEEN)}
    verdict = "jobs cannot run here yet" if count[FAIL] else "jobs can run here"
    return (
        f"{verdict}: {_counted(count[FAIL], 'failure')}, {_counted(count[WARN], 'warning')}, "
        f"{count[UNSEEN]} could not be seen"
    )


def as_json(checked: Sequence[Checked]) -> dict[str, Any]:
    """For programs."""
    return {
        "ok": is_fine(checked),
        "checks": [
            {"check": name, "level": finding.level, "found": finding.words, "advice": finding.advice}
            for name, finding in checked
        ],
    }


def is_fine(checked: Sequence[Checked]) -> bool:
    """Whether nothing is in the way of jobs."""
    return all(finding.level != FAIL for _, finding in checked)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
