"""PURE: a view of a job, or of several, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ringps_launcher.kubernetes.fields import mapping, mappings, number, one_line, text
from ringps_launcher.kubernetes.table import duration, rate, table
from ringps_launcher.kubernetes.view import JobView

_WIDEST_REASON = 160


def jobs_table(views: Sequence[JobView], now: float, *, with_namespace: bool) -> list[str]:
    """A line for each job."""
    head = ["NAME", "STATUS", "WORKERS", "STEP", "RATE", "AGE", "RESTARTS", "REASON"]
    rows = [
        [
            view.name,
            view.status,
            f"{len(view.members)}/{view.workers}",
            _step(view.document),
            _rate(view),
            duration(now - view.created),
            str(sum(_restarts(view.document).values())),
            _short(_reason(view)),
        ]
        for view in views
    ]
    if with_namespace:
        head.insert(0, "NAMESPACE")
        for row, view in zip(rows, views, strict=True):
            row.insert(0, view.namespace)
    return table(head, rows, right=("WORKERS", "STEP", "AGE", "RESTARTS"))


def job_report(view: JobView, now: float, *, place: Sequence[str]) -> list[str]:
    """All about one job. `place` are the options that lead other commands to it."""
    parts = [
        list(_head(view, now)),
        list(_waits(view)),
        list(_ring(view)),
        list(_outsiders(view)),
        list(_events(view, now)),
        [f"not looked at: {line}" for line in view.unseen],
        ["next:", *(f"  {command}" for command in next_commands(view, place))],
    ]
    lines: list[str] = []
    for part in parts:
        if part:
            lines += [*([""] if lines else []), *part]
    return lines


def next_commands(view: JobView, place: Sequence[str]) -> list[str]:
    """What one may want to do next, most likely first."""

    def command(*words: str) -> str:
        return " ".join(("ringps", *words[:1], *place, *words[1:], view.name))

    cancel = command("cancel")
    if view.status == "done":
        return [command("logs"), f"{cancel}    # removes what is left of it; checkpoints stay"]
    if view.status == "failed":
        return [command("logs"), command("logs", "--coordinator"), cancel]
    if view.status == "suspended":
        return [command("resume"), command("logs"), cancel]
    if view.status == "cancelling":
        return [command("status")]
    if view.status == "stopping":
        return [command("logs", "-f"), command("status"), command("resume"), cancel]
    running = [command("logs", "-f"), command("suspend")]
    if view.status == "running":
        return [*running, cancel]
    return [*(running if view.status == "waiting" else [command("status")]), cancel]


def _head(view: JobView, now: float) -> Iterator[str]:
    document = view.document
    since = document.get("since")
    told = view.status == text(document, "phase") and isinstance(since, (int, float))
    lasting = f" for {duration(now - float(since or 0))}" if told and not view.is_over else ""
    yield f"job {view.name} in namespace {view.namespace}: {view.status}{lasting}"
    rows: list[tuple[str, str]] = []
    if view.summary and not (view.reasons and view.summary == view.reasons[0].text):
        rows.append(("reason", view.summary))
    if view.stale_s is not None:
        rows.append(
            ("coordinator", f"silent for {duration(view.stale_s)}: what is said of the ring may be old")
        )
    rows.append(("workers", _workers(view)))
    if document.get("step") is not None:
        rows.append(("progress", f"step {_step(document)}{_rates(view)}"))
    if checkpoint := mapping(document, "checkpoint"):
        rows.append(("checkpoint", _checkpoint(checkpoint, now)))
    elif document and not view.is_over:
        rows.append(("checkpoint", "none yet"))
    if document:
        rows.append(("restarts", _restarts_text(document)))
    rows.append(("age", _age(view, now)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name.ljust(width)}  {value}"


def _workers(view: JobView) -> str:
    at_least = f" (at least {view.min_workers})" if view.min_workers < view.workers else " (a fixed ring)"
    if view.members:
        generation = number(view.document, "generation")
        return f"{len(view.members)} of {view.workers}{at_least} in the ring, generation {generation}"
    return f"{view.workers}{at_least if view.workers > 1 else ''}"


def _rates(view: JobView) -> str:
    rates = []
    for key, unit in (("steps_per_s", "steps/s"), ("samples_per_s", "samples/s")):
        value = view.document.get(key)
        if view.status in ("running", "stopping") and isinstance(value, (int, float)):
            rates.append(f", {rate(value)} {unit}")
    return "".join(rates)


def _checkpoint(checkpoint: Mapping[str, Any], now: float) -> str:
    saved = checkpoint.get("t")
    ago = f", {duration(now - saved)} ago" if isinstance(saved, (int, float)) else ""
    where = one_line(text(checkpoint, "where"))
    return f"step {number(checkpoint, 'step')}{ago}{f', in {where}' if where else ''}"


def _restarts_text(document: Mapping[str, Any]) -> str:
    counts = [f"{count} {cause}" for cause, count in _restarts(document).items() if count]
    used, most = number(document, "budget", "used"), number(document, "budget", "max")
    return f"{', '.join(counts) or 'none'}; {used} of {most} that the budget allows are used"


def _age(view: JobView, now: float) -> str:
    age = duration(now - view.created)
    if view.ended is None:
        return age
    return f"{age}; it ended {duration(now - view.ended)} ago, after {duration(view.ended - view.created)}"


def _waits(view: JobView) -> Iterator[str]:
    if view.reasons:
        yield "what it waits for:" if view.status != "running" else "what is not as it should be:"
        for reason in view.reasons:
            yield f"  {reason.text}"
            if reason.advice:
                yield f"      {reason.advice}"


def _ring(view: JobView) -> Iterator[str]:
    if not view.members:
        return
    noted = any(member.note for member in view.members)
    racked = any(member.rack for member in view.members)
    head = [
        "RANK",
        "WORKER",
        "POD",
        "NODE",
        "ZONE",
        *(["RACK"] if racked else []),
        *(["NOTE"] if noted else []),
    ]
    rows = [
        [
            str(member.rank),
            str(member.worker_id),
            member.pod,
            member.node or "?",
            member.zone or "-",
            *([member.rack or "-"] if racked else []),
            *([member.note] if noted else []),
        ]
        for member in view.members
    ]
    yield from table(head, rows, right=("RANK", "WORKER"))


def _outsiders(view: JobView) -> Iterator[str]:
    others = [
        other
        for other in view.outsiders
        if other.worker_id is not None or other.state != "running" or other.why
    ]
    if not others:
        return
    yield "pods that are not in the ring:" if view.members else "pods:"
    rows = [
        [
            "coordinator" if other.worker_id is None else str(other.worker_id),
            other.pod,
            other.node or "-",
            other.state,
            _short(other.why),
        ]
        for other in others
    ]
    yield from table(["WORKER", "POD", "NODE", "STATE", "WHY"], rows)


def _events(view: JobView, now: float) -> Iterator[str]:
    events = mappings(view.document, "events")
    if not events:
        return
    yield "events:"
    rows = []
    for event in events[-20:]:
        when = event.get("t")
        ago = f"{duration(now - when)} ago" if isinstance(when, (int, float)) else "?"
        rows.append([f"  {ago}", one_line(text(event, "text"))])
    width = max(len(ago) for ago, _ in rows)
    yield from (f"{ago.ljust(width)}  {words}" for ago, words in rows)


def _reason(view: JobView) -> str:
    if view.stale_s is not None:
        return f"coordinator silent for {duration(view.stale_s)}{f'; {view.summary}' if view.summary else ''}"
    return view.summary


def _step(document: Mapping[str, Any]) -> str:
    step = document.get("step")
    return "-" if step is None else str(step)


def _rate(view: JobView) -> str:
    if view.status not in ("running", "stopping"):
        return "-"
    for key, unit in (("samples_per_s", "samples/s"), ("steps_per_s", "steps/s")):
        value = view.document.get(key)
        if isinstance(value, (int, float)):
            return f"{rate(value)} {unit}"
    return "-"


def _restarts(document: Mapping[str, Any]) -> dict[str, int]:
    return {cause: number(document, "restarts", cause) for cause in mapping(document, "restarts")}


def _short(words: str) -> str:
    return words if len(words) <= _WIDEST_REASON else words[: _WIDEST_REASON - 3] + "..."
