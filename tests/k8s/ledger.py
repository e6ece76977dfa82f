"""What the processes of `train.py` wrote down, and what must be true of it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

SAMPLES = 203

Line = dict[str, Any]


class Ledger:
    """All lines, in the order of their times."""

    def __init__(self, directory: Path) -> None:
        self.lines: list[Line] = []
        for path in directory.glob("ledger-*.jsonl"):
            # The last line of a process that was killed may be torn.
            whole = path.read_text().rpartition("\n")[0].splitlines()
            self.lines += [json.loads(line) for line in whole]
        self.lines.sort(key=lambda line: line["t"])

    def of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def last_step(self) -> int:
        """The newest that was committed."""
        return max((line["step"] for line in self.of("commit")), default=0)

    @property
    def rollbacks(self) -> int:
        """How often the ring went on from a checkpoint that was older than what had been committed."""
        return self._timeline()[1]

    def commits(self) -> dict[int, Line]:
        """Of each step the commit that counts: the last one, if the ring went back to a checkpoint."""
        return self._timeline()[0]

    def check(self) -> None:
        """Steps 1 to the last were committed, alike on all, and each epoch's samples were trained once."""
        commits, ends = self.commits(), self.of("end")
        assert ends, "nobody came to the end"
        assert sorted(commits) == list(range(1, ends[0]["step"] + 1)), (len(commits), ends)
        assert len({line["digest"] for line in ends}) == 1, ends
        drawn: dict[tuple[Any, int], list[Line]] = {}
        for line in self.of("batch"):
            drawn.setdefault((tuple(line["who"]), line["step"]), []).append(line)
        epochs: dict[int, list[int]] = {}
        for step, commit in commits.items():
            for voter, [row] in zip(commit["voters"], commit["account"], strict=True):
                if row[-1]:
                    tried = drawn[tuple(voter), step]
                    samples = [line for line in tried if line["t"] <= commit["t"]][-1]["samples"]
                    assert len(samples) == row[-1], (step, voter)
                    epochs.setdefault(row[0], []).extend(samples)
        for epoch, samples in epochs.items():
            counts = Counter(samples)
            assert set(counts.values()) == {1}, f"epoch {epoch}: more than once: {counts.most_common(5)}"
            assert epoch >= max(epochs) - 1 or len(counts) == SAMPLES, f"epoch {epoch}: {len(counts)}"

    def digest(self) -> str:
        """Of the parameters at the end."""
        [digest] = {line["digest"] for line in self.of("end")}
        return str(digest)

    def worlds(self) -> list[int]:
        """World sizes in the order in which the committed steps had them."""
        worlds: list[int] = []
        for _, commit in sorted(self.commits().items()):
            if worlds[-1:] != [len(commit["voters"])]:
                worlds.append(len(commit["voters"]))
        return worlds

    def longest_gap_s(self) -> float:
        """Between two commits that follow on each other, beyond the usual time of a step."""
        first: dict[int, float] = {}
        for line in self.of("commit"):
            first.setdefault(line["step"], line["t"])
        times = [first[step] for step in sorted(first)]
        gaps = sorted(b - a for a, b in itertools.pairwise(times))
        return gaps[-1] - gaps[len(gaps) // 2]

    def _timeline(self) -> tuple[dict[int, Line], int]:
        commits: dict[int, Line] = {}
        restored: list[tuple[float, int]] = [(line["t"], line["step"]) for line in self.of("restored")]
        rollbacks = 0
        for line in self.of("commit"):
            step = line["step"]
            known = commits.get(step)
            same = known is not None and all(known[key] == line[key] for key in ("voters", "account"))
            if known is not None and same and known["who"] != line["who"]:
                continue
            if known is not None:
                went_back = any(known["t"] < t < line["t"] and back < step for t, back in restored)
                assert went_back, f"step {step} was committed twice: {known} {line}"
                rollbacks += 1
                for later in [other for other in commits if other >= step]:
                    del commits[later]
            commits[step] = line
        return commits, rollbacks
