"""The ledgers of a job of `train.py`, followed while it trains: how far it is, and who trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Member = tuple[int, str, int]
"""One process of a worker: worker id, pod, process id."""


class Trail:
    """`read` takes in what was written since; whole lines only, each of them once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._commits: dict[int, Any] = {}
        self.last_step = 0
        """The newest that was committed."""
        self.members: tuple[Member, ...] = ()
        """Who committed last."""
        self.committed_at_s = 0.0
        """When that was, as `time.time()` has it."""
        self.repeated: list[int] = []
        """Steps that were committed again by others or with other samples: the ring had gone back."""

    def read(self) -> None:
        lines = []
        for path in self._directory.glob("ledger-*.jsonl"):
            with path.open("rb") as file:
                offset = self._offsets.get(path, 0)
                file.seek(offset)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._offsets[path] = offset + len(whole) + 1
                lines += [json.loads(line) for line in whole.splitlines() if b'"commit"' in line]
        for line in sorted(lines, key=lambda line: line["t"]):
            what = (line["voters"], line["account"])
            if self._commits.setdefault(line["step"], what) != what:
                self.repeated.append(line["step"])
                self._commits[line["step"]] = what
            self.last_step = max(self.last_step, line["step"])
            if line["t"] > self.committed_at_s:
                self.committed_at_s = line["t"]
                self.members = tuple((worker_id, pod, pid) for worker_id, pod, pid in line["voters"])
