"""PURE: how workers and the launcher end, as numbers and in words."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from ringps.worker_env import SUSPENDED_CODE

_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A worker that failed."""

    worker_id: int
    rank: int
    host: str
    code: int
    """As a shell gives it: 128 + number for a signal."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker of this machine without which the job went on."""

    worker_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is whole."""

    step: int
    directory: str
    """A path or a URL."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a start of the workers here ended, and why."""

    code: int
    failure: Failure | None = None
    restarts: bool = False
    """After a failure: whether the whole ring is to be started again, if the budget allows."""
    suspended: bool = False
    """Whether the job stopped at a checkpoint, to go on another time."""
    saved: Saved | None = None
    """The newest checkpoint, of a job that stopped at one."""
    signal: int | None = None
    losses: tuple[Loss, ...] = ()
    """In order; of a job that came to a good end all the same."""
    replaced: int = 0
    """How many replacements were started."""


def exit_code(status: int) -> int:
    """A `Popen.returncode` as a shell would give it."""
    return status if status >= 0 else 128 - status


def describe_exit(status: int) -> str:
    """Why a process with this `Popen.returncode` is gone."""
    if status >= 0:
        return f"process exited with code {status}"
    try:
        return f"process killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"process killed by signal {-status}"


def describe_stop(number: int) -> str:
    """Why a launcher that was asked to end with this signal ends."""
    if number == signal.SIGPIPE:
        return "nobody reads our output any more"
    return f"got {signal.Signals(number).name}"


def stopped_at(saved: Saved | None) -> str:
    """What is said last of a job that stopped at a checkpoint."""
    where = (
        "at a checkpoint"
        if saved is None
        else f"after step {saved.step}, which is saved in {saved.directory}"
    )
    return f"stopped {where}; the same command goes on from there (exit code {SUSPENDED_CODE})"


def failed(failure: Failure) -> str:
    """Which worker failed, and why."""
    where = f"worker {failure.worker_id} on {failure.host}"
    return f"rank {failure.rank} ({where}) failed: {failure.reason}"


def last_line(outcome: Outcome, *, log: str | None, local: bool, outlook: str = "") -> str | None:
    """What the launcher says last, or None after success without losses.

    Args:
        outcome: of the last start.
        log: the failed worker's log file, if there is one.
        local: whether the failed worker ran on this machine.
        outlook: why the ring is not started again, where it might have been.
    """
    if outcome.suspended:
        return stopped_at(outcome.saved)
    if outcome.failure is None:
        if outcome.signal is not None:
            return f"stopped: {describe_stop(outcome.signal)}"
        return _done_after_losses(outcome) if outcome.losses else None
    if not local:
        where = f"its output is at the launcher on {outcome.failure.host}"
    elif log is not None:
        where = f"its log is {log}"
    else:
        where = "its output is above; --log-dir DIR keeps it in a file"
    return "; ".join(filter(None, (failed(outcome.failure), outlook, where)))


def _done_after_losses(outcome: Outcome) -> str:
    count = len(outcome.losses)
    were = "worker was" if count == 1 else "workers were"
    entries = [f"worker {loss.worker_id}: {loss.reason}" for loss in outcome.losses[:_LISTED]]
    if count > _LISTED:
        entries.append(f"and {count - _LISTED} more")
    replaced = outcome.replaced or "none"
    return f"done; {count} {were} lost on the way ({'; '.join(entries)}) and {replaced} replaced"
