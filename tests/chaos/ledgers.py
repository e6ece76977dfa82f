"""What the ledgers of a chaos campaign must show, whatever happened to the workers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]

GOOD_LOSS = 3.0
"""After a few dozen steps; that of the untrained model is about 8."""


def read(directory: Path) -> dict[tuple[int, int], Lines]:
    """Every process's lines, by worker and process id."""
    found = {}
    for path in directory.glob("ledger-*.jsonl"):
        _, worker_id, pid = path.stem.split("-")
        text = path.read_text()
        found[int(worker_id), int(pid)] = [json.loads(line) for line in text.splitlines()]
    return found


def check(directory: Path, *, steps: int, samples: int) -> dict[str, int]:
    """All finished epochs trained every sample once, in `steps` steps that all ranks agree on.

    Returns:
        Some counts, for the curious.

    Raises:
        AssertionError: they did not.
    """
    processes = read(directory)
    commits = _commits(processes)
    assert sorted(commits) == list(range(1, steps + 1)), (
        f"committed steps are not 1 to {steps}: {_gaps(sorted(commits), steps)}"
    )
    for process, lines in processes.items():
        own = [line["step"] for line in lines if line["kind"] == "commit"]
        assert own == list(range(own[0], own[0] + len(own))) if own else True, (
            f"worker and process {process} committed other steps than one after the other: {own}"
        )
    epochs = _trained(commits, processes)
    last = max(epochs)
    for epoch, trained in epochs.items():
        counts = Counter(trained)
        wrong = {one: counts[one] for one in range(samples) if counts[one] != 1}
        if epoch == last:  # it may not be finished
            wrong = {one: count for one, count in wrong.items() if count > 1}
        assert not wrong, (
            f"epoch {epoch} of {last}: samples that were not trained once, and how often: {wrong}"
        )
    ends = [line for lines in processes.values() for line in lines if line["kind"] == "end"]
    assert ends, "no process came to the end"
    assert {(line["step"], line["digest"]) for line in ends} == {(steps, ends[0]["digest"])}
    assert ends[0]["loss"] < GOOD_LOSS, f"the model has learned nothing: its loss is {ends[0]['loss']}"
    generations = {line["generation"] for lines in processes.values() for line in lines}
    return {
        "processes": len(processes),
        "epochs": last,
        "ended": len(ends),
        "generations": max(generations),
        "alone": sum(len(commit["voters"]) == 1 for commit in commits.values()),
    }


def _commits(processes: dict[tuple[int, int], Lines]) -> dict[int, dict[str, Any]]:
    commits: dict[int, dict[str, Any]] = {}
    for process, lines in processes.items():
        for line in lines:
            if line["kind"] == "commit":
                known = commits.setdefault(line["step"], line)
                for what in ("voters", "account"):
                    assert known[what] == line[what], (
                        f"step {line['step']}: {what} of {process} and another differ: {line} {known}"
                    )
    return commits


def _trained(
    commits: dict[int, dict[str, Any]], processes: dict[tuple[int, int], Lines]
) -> dict[int, list[int]]:
    """The samples that were trained by committed steps, by epoch."""
    batches = {
        (process, line["step"]): line["samples"]
        for process, lines in processes.items()
        for line in lines
        if line["kind"] == "batch"
    }
    epochs: dict[int, list[int]] = {}
    for step, commit in commits.items():
        for voter, rows in zip(commit["voters"], commit["account"], strict=True):
            ((epoch, *_, count),) = rows
            if not count:
                continue
            drawn = batches[tuple(voter), step]
            assert len(drawn) == count, f"step {step}: {voter} drew {drawn}, and is credited with {count}"
            epochs.setdefault(epoch, []).extend(drawn)
    return epochs


def _gaps(found: list[int], steps: int) -> list[int]:
    return sorted(set(range(1, steps + 1)) ^ set(found))[:20]
