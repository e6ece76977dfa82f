"""From a worker's end, a cut connection or a silent link to the next committed step; what joining takes.

    python benchmarks/recovery.py                       # silent links need root

A job of n workers trains while this process harms it, time and again at a random moment of a step. All times
are those that the workers noted on the clock that they share; the launcher's and the coordinator's events
are put on it too. *Gone* is when the kernel has ended the process. *Noticed* is when the coordinator's event
says so or, where it has none, when the first member is told of the next generation. *Next step* is when the
last of the survivors has committed its first step of the next generation; what a failure costs is that less
a normal step of the same run.

What a commit costs is looked at twice: the time inside of it, and elastic jobs in turns with fixed ones,
which neither hash nor vote.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import commit_costs
import elastic_job
import plots
import recovery_report
import report
from harm import harm
from hosts import Hosts, HostsError, obstacle
from report import Row
from ringps import worker_env
from watched_job import JobError, Note, WatchedJob, load, run_command

_STEADY_STEPS = 8
_PORT = 4710


@dataclass
class Found:
    """What came of one operation, a number per repetition."""

    times_s: list[float] = field(default_factory=list)
    above_s: list[float] = field(default_factory=list)
    """The same without a normal step, where it contains one."""
    steps_s: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)


class Measuring:
    """Collects what is measured of jobs with one model."""

    def __init__(self, options: argparse.Namespace, model: str, transport: str) -> None:
        self.n: int = options.workers
        self.model = model
        self.transport = transport
        self.random = random.Random(options.seed)
        self._found: dict[str, Found] = {}
        self._victims: list[int] = []
        self._bytes = 1

    def add(self, op: str, *times_s: float, step_s: float | None = None, **facts: object) -> None:
        """Note measured times. `step_s`: the normal step that each contains."""
        found = self._found.setdefault(op, Found())
        found.times_s += times_s
        if step_s is not None:
            found.steps_s.append(step_s)
            found.above_s += [time_s - step_s for time_s in times_s]
        found.loads.append(load())
        found.facts.update(facts)
        median_s = statistics.median(times_s)
        print(f"recovery: {self.model}: {op} {1e3 * median_s:.1f} ms", file=sys.stderr, flush=True)

    @contextmanager
    def job(
        self,
        options: Sequence[str] = (),
        arguments: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> Iterator[WatchedJob]:
        """A running `ringps run` of this model."""
        options = ["--max-restarts", "100", "--transport", self.transport, *options]
        arguments = ["--model", self.model, *arguments]
        with _directory() as directory, WatchedJob(directory, settings) as job:
            job.start(run_command(__file__, directory, arguments, workers=self.n, options=options))
            yield job
            self.size_by(job)

    def size_by(self, job: WatchedJob) -> None:
        """Learn the size of the model from a job that trains it."""
        self._bytes = int(job.of("ready")[0].details["parameter_bytes"])

    def victim(self, job: WatchedJob) -> int:
        """The worker id of whom to harm next: each in turn, for frequent restarts are delayed."""
        if not self._victims:
            self._victims = self.random.sample(sorted(job.members()), len(job.members()))
        return self._victims.pop()

    def at_random_moment(self, step_s: float) -> None:
        """Wait for any part of a step."""
        time.sleep(self.random.uniform(0, step_s))

    def rows(self) -> list[Row]:
        """A row per operation."""
        return [self._row(op, found) for op, found in self._found.items()]

    def _row(self, op: str, found: Found) -> Row:
        facts: dict[str, object] = {
            "transport": self.transport,
            "model": self.model,
            "load_1m": max(found.loads),
            **found.facts,
        }
        if found.above_s:
            facts["step_ms"] = round(1e3 * statistics.median(found.steps_s), 2)
            facts["above_step_ms"] = round(1e3 * statistics.median(found.above_s), 2)
            facts["above_step_ms_max"] = round(1e3 * max(found.above_s), 2)
        if op in recovery_report.BARS_S:
            facts["bar_ms"] = 1e3 * recovery_report.BARS_S[op]
        return report.row(
            bench="recovery",
            backend="ringps",
            op=op,
            size_bytes=self._bytes,
            dtype="float32",
            world_size=self.n,
            times_s=found.times_s,
            facts=facts,
        )


# What is measured.


def measure_losses(options: argparse.Namespace) -> list[Row]:
    """SIGKILL, SIGSTOP and SIGTERM, in turns."""
    measuring = Measuring(options, options.model, "auto")
    n = measuring.n
    with measuring.job() as job:
        for _ in range(options.repeats):
            for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
                step_s = job.steady(n, _STEADY_STEPS)
                worker_id = measuring.victim(job)
                pid = job.members()[worker_id]
                measuring.at_random_moment(step_s)
                gone = os.pidfd_open(pid)
                done = harm(job, partial(os.kill, pid, number))
                if number == signal.SIGKILL:
                    select.select([gone], [], [])
                    gone_s = time.monotonic() - done.at_s
                    measuring.add("sigkill_gone", gone_s)
                os.close(gone)
                name = number.name.lower()
                next_step_s = done.next_step_s()
                if number == signal.SIGTERM:
                    measuring.add("sigterm_pause", done.pause_s(), step_s=step_s)
                    job.wait(partial(done.exited, worker_id), 60.0, "the exit of the worker that leaves")
                    measuring.add("sigterm_exit", done.noticed_s("worker_exited", worker_id))
                else:
                    measuring.add(f"{name}_noticed", done.noticed_s("worker_lost", worker_id))
                    measuring.add(f"{name}_next_step", next_step_s, step_s=step_s)
    return measuring.rows()


def measure_cut(options: argparse.Namespace) -> list[Row]:
    """A connection that closes between two live processes, each time another one."""
    measuring = Measuring(options, options.model, "tcp")
    n = measuring.n
    with measuring.job() as job:
        # The same two cut off from each other again would be one member less.
        for _ in range(min(n, max(2, options.repeats))):
            step_s = job.steady(n, _STEADY_STEPS)
            pid = job.members()[measuring.victim(job)]
            measuring.at_random_moment(step_s)
            asked = harm(job, partial(os.kill, pid, elastic_job.CUT_SIGNAL))
            asked.next_step_s()
            done = asked.begun_by("cut")
            next_step_s = done.next_step_s()
            measuring.add("cut_noticed", done.told_s())
            measuring.add("cut_next_step", next_step_s, step_s=step_s, members_left=done.members())
            said = done.events("generation")[0].get("reason")
            print(f"recovery: {said}", file=sys.stderr, flush=True)
    return measuring.rows()


def measure_join(options: argparse.Namespace) -> list[Row]:
    """A worker takes another one's place: what the others wait, and where its own time goes."""
    measuring = Measuring(options, options.joiner_model, "auto")
    n = measuring.n
    with measuring.job() as job:
        step_s = job.steady(n, _STEADY_STEPS)
        for _ in range(options.repeats):
            victim = job.members()[measuring.victim(job)]
            known = job.pids_ever()
            harm(job, partial(os.kill, victim, signal.SIGKILL)).next_step_s()
            step_s = job.steady(n, _STEADY_STEPS)
            (pid,) = job.pids_ever() - known
            _add_joining(measuring, job, pid, step_s)
    return measuring.rows()


def _add_joining(measuring: Measuring, job: WatchedJob, pid: int, step_s: float) -> None:
    own: dict[str, Note] = {}
    for note in (note for note in job.notes() if note.pid == pid):
        own.setdefault(note.what, note)
    first_s, generation = own["committed"].t_s, own["committed"].details["generation"]
    start_s = own["started"].details["start_s"]
    pauses = []
    for other in job.members().values():
        times_s = [note.t_s for note in job.of("committed") if note.pid == other and other != pid]
        pauses += [
            late_s - early_s
            for early_s, late_s in pairwise(times_s)
            if late_s > own["fetch"].t_s and early_s < first_s
        ]
    fetched = next(
        event
        for event in reversed(job.events())
        if event["event"] == "state_fetched" and event["generation"] == generation
    )
    measuring.add("join_pause", max(pauses), step_s=step_s)
    measuring.add("join_total", first_s - start_s)
    measuring.add("join_start", own["ready"].t_s - start_s)
    measuring.add("join_wait", own["fetch"].t_s - own["ready"].t_s)
    measuring.add("join_fetch", own["fed"].t_s - own["fetch"].t_s, fetched_bytes=fetched["bytes"])
    measuring.add("join_first_step", first_s - own["fed"].t_s)


def measure_commit(options: argparse.Namespace) -> list[Row]:
    """What hashes and votes cost, from inside, and what it costs to compare parameters."""
    measuring = Measuring(options, options.commit_model, "auto")
    n, steps = measuring.n, options.steps
    for turn in range(options.turns):
        kinds = {"elastic": [], "fixed": ["--min-workers", str(n)]}
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            with measuring.job(kinds[kind]) as job:
                measuring.add(f"step_{kind}", job.steady(n, steps, after=steps))
    every = {"RINGPS_CHECK_PARAMETERS_EVERY": 5}
    with measuring.job(arguments=["--costs"], settings=every) as job:
        step_s = job.steady(n, steps, after=steps)
        notes = [note.details for note in job.of("committed") if note.details["step"] > steps]
        step_cpu_s = statistics.median(note["step_cpu_s"] for note in notes)
        for part in commit_costs.PARTS:
            own = [note for note in notes if note[f"{part}_s"]]
            cpu_s = statistics.median(note[f"{part}_cpu_s"] for note in own)
            measuring.add(
                f"commit_{part}",
                *(note[f"{part}_s"] for note in own),
                whole_step_ms=round(1e3 * step_s, 2),
                cpu_ms=round(1e3 * cpu_s, 3),
                share_of_cpu=round(cpu_s / step_cpu_s, 4),
            )
    return measuring.rows()


def measure_silence(options: argparse.Namespace) -> list[Row]:
    """Between hosts of their own: a link over which nothing comes, and a host from which nothing comes."""
    measuring = Measuring(options, options.model, "tcp")
    n = measuring.n
    with Hosts(n, None) as hosts, _directory() as directory, WatchedJob(directory) as job:
        _start_on_hosts(hosts, job, measuring)
        for _ in range(options.repeats):
            step_s = job.steady(n, _STEADY_STEPS)
            one = measuring.victim(job)
            other = (one + 1) % n  # worker ids are given out by host, so this is its right neighbour
            measuring.at_random_moment(step_s)
            done = harm(job, partial(hosts.silence, one, other))
            next_step_s = done.next_step_s()
            hosts.let_speak(one, other)
            measuring.add("silent_link_noticed", done.told_s())
            measuring.add("silent_link_next_step", next_step_s, step_s=step_s)
        for _ in range(options.repeats):
            step_s = job.steady(n, _STEADY_STEPS)
            host = measuring.victim(job)
            done = harm(job, partial(hosts.unplug, host))
            next_step_s = done.next_step_s()
            hosts.replug(host)
            measuring.add("silent_host_noticed", done.told_s())
            measuring.add("silent_host_next_step", next_step_s, step_s=step_s)
        measuring.size_by(job)
    return measuring.rows()


def _start_on_hosts(hosts: Hosts, job: WatchedJob, measuring: Measuring) -> None:
    key, address = str(job.directory / "key"), f"{hosts.switch_address}:{_PORT}"
    coordinator = [*hosts.inside_switch(), sys.executable, "-m", "ringps_launcher", "coordinator"]
    coordinator += ["--bind", address, "--key-file", key, "-n", str(measuring.n)]
    job.start([*coordinator, "--events", str(job.directory / "events.jsonl")])
    job.wait(lambda: "listens on" in job.log(), 60.0, "the coordinator")
    for host in range(measuring.n):
        join = ["--join", address, "--key-file", key, "--address", hosts.address(host)]
        join += ["--host", f"node-{host}", "--max-restarts", "100", "--transport", measuring.transport]
        arguments = ["--model", measuring.model]
        command = run_command(__file__, job.directory, arguments, workers=1, options=join, events=False)
        job.start([*hosts.inside(host), *command])


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ringps-recovery-") as name:
        yield Path(name)


MEASURES = {
    "losses": measure_losses,
    "cut": measure_cut,
    "join": measure_join,
    "commit": measure_commit,
    "silence": measure_silence,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Recovery from losses, and joining.")
    add = parser.add_argument
    add("-n", "--workers", type=int, default=4)
    add("--only", type=_cases, default=list(MEASURES), metavar="CASE,CASE", help=f"of {', '.join(MEASURES)}")
    add("--repeats", type=int, default=3, help="of each case (default: 3)")
    add("--turns", type=int, default=1, help="elastic and fixed jobs to compare (default: 1 of each)")
    add("--steps", type=int, default=40, help="to measure what commits cost, and before it (default: 40)")
    names = ", ".join(elastic_job.WORKLOADS)
    add("--model", default="gpt-small", help=f"of {names} (default: gpt-small)")
    add("--joiner-model", default="mlp-400mb", help="for the case join (default: mlp-400mb)")
    add("--commit-model", default="mlp-30mb", help="for the case commit (default: mlp-30mb)")
    add("--seed", type=int, default=0, help="of whom to harm, and when")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--plot", type=Path, metavar="FILE", help="draw a plot there")
    add("--work", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    add("--costs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if worker_env.read() is not None:
        costs = commit_costs.CommitCosts().take if options.costs else None
        elastic_job.train(options.work, options.model, costs)
        return
    if options.plot:
        report.load_pyplot()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    for case in options.only:
        why = obstacle() if case == "silence" else None
        if why is not None:
            print(f"recovery: SKIPPED silence: {why}", file=sys.stderr, flush=True)
            continue
        try:
            rows += MEASURES[case](options)
        except (JobError, HostsError) as error:
            sys.exit(f"recovery.py: {case}: {error}")
    print(recovery_report.table(rows).text(), flush=True)
    print(*recovery_report.verdicts(rows), sep="\n")
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.recovery(rows), options.plot)


def _cases(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    return names


if __name__ == "__main__":
    main()
