"""Useful samples per second while a worker is killed every few seconds, against torchrun with DDP over gloo.

    python benchmarks/goodput.py                        # a short schedule
    python benchmarks/goodput.py --seconds 180          # a kill every 15 s for 3 minutes

Both train the same model on the same samples, with the same global batch, under the same schedule of
SIGKILLs: who is killed next is drawn from a seed. ringps goes on in the processes that are left and feeds a
replacement from its peers. torchrun starts all workers anew after each loss (`--max-restarts 100`), which
then load the checkpoint that rank 0 writes every 10 steps, as its documentation asks of a script.

A sample is useful if the step that it was trained in was not lost. *Goodput* is useful samples per second
with kills, divided by those of the same contestant without.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import elastic_job
import plots
import report
from elastic_job import GLOBAL_BATCH, Notebook, Training
from report import Row, Table
from ringps.data.assignment import Permutation, share
from watched_job import JobError, WatchedJob, load, run_command, runs

RINGPS, TORCHRUN = "ringps", "torchrun-ddp-gloo"
WITH_KILLS, WITHOUT_KILLS = "with_kills", "without_kills"
CHECKPOINT_STEPS = 10
_WARM_STEPS = 10


@dataclass
class Run:
    """What a contestant did."""

    seconds: float
    curve: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, useful samples since then; about one point a second."""
    steps_lost: int = 0
    kills: int = 0
    ended_s: float | None = None
    """When the job ended by itself, which it should not."""
    said: str = ""
    """What it printed last, if it ended."""

    @property
    def samples(self) -> int:
        return self.curve[-1][1]

    @property
    def rate(self) -> float:
        """Useful samples per second."""
        return self.samples / self.seconds


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """How to start a job, and how to read its workers' notes."""

    name: str
    command: Callable[[argparse.Namespace, Path], list[str]]
    useful: Callable[[WatchedJob, float, Sequence[float]], int]
    """Useful samples at a time, given when workers were killed before."""
    lost: Callable[[WatchedJob, float, int], int]
    """Steps that were lost until a time, given the useful samples of that time."""


# ringps.


def ringps_command(options: argparse.Namespace, directory: Path) -> list[str]:
    """Starts the job."""
    arguments = ["--as", RINGPS, "--model", options.model]
    return run_command(
        __file__, directory, arguments, workers=options.workers, options=["--max-restarts", "100"]
    )


def ringps_useful(job: WatchedJob, now_s: float, kills_s: Sequence[float]) -> int:
    """What any member has committed."""
    return max((note.details["samples"] for note in job.of("trained") if note.t_s <= now_s), default=0)


def ringps_lost(job: WatchedJob, now_s: float, useful: int) -> int:
    """Steps that a process trained again, or that a new one began before where the others were."""
    lost, newest = 0, 0
    last: dict[int, int] = {}
    for note in job.of("trained"):
        step = note.details["step"]
        expected = last.get(note.pid, newest - 1) + 1
        lost += max(0, expected - step)
        last[note.pid] = step
        newest = max(newest, step)
    return lost


# torchrun.


def torchrun_command(options: argparse.Namespace, directory: Path) -> list[str]:
    """Starts the job as torchrun's documentation does for an elastic one on a single node."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
    command += [f"--nproc-per-node={options.workers}", "--max-restarts=100"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--log-dir={directory / 'torchrun'}"]
    return [*command, __file__, "--work", str(directory), "--as", TORCHRUN, "--model", options.model]


def torchrun_useful(job: WatchedJob, now_s: float, kills_s: Sequence[float]) -> int:
    """What the running processes have trained; when one of them was killed, what was saved."""
    trained = [note for note in job.of("trained") if note.t_s <= now_s]
    if not trained:
        return 0
    if any(kill_s > trained[-1].t_s - 1e-3 for kill_s in kills_s if kill_s <= now_s):
        saved = [note for note in job.of("saved") if note.t_s <= now_s]
        return GLOBAL_BATCH * max((note.details["step"] for note in saved), default=0)
    return GLOBAL_BATCH * int(trained[-1].details["step"])


def torchrun_lost(job: WatchedJob, now_s: float, useful: int) -> int:
    """Steps that rank 0 trained and that are not among the useful ones."""
    return sum(note.t_s <= now_s for note in job.of("trained")) - useful // GLOBAL_BATCH


def train_ddp(directory: Path, name: str) -> None:
    """Train until the job is stopped, as a worker of torchrun."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    notebook = Notebook(directory, rank)
    notebook.note("started", start_s=elastic_job.process_start_s())
    torch.distributed.init_process_group("gloo")
    training = Training(name)
    parallel = DistributedDataParallel(training.model)
    checkpoint, unfinished = directory / "checkpoint.pt", directory / "checkpoint.tmp"
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        training.model.load_state_dict(saved["model"])
        training.optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    notebook.note("ready", parameter_bytes=training.parameter_bytes)
    steps_per_epoch = len(training.samples) // GLOBAL_BATCH
    while True:
        epoch, first = divmod(step, steps_per_epoch)
        order = Permutation(0, epoch, len(training.samples))
        shares = [
            [
                order[place]
                for place in share(range(one * GLOBAL_BATCH, (one + 1) * GLOBAL_BATCH), rank, world_size)
            ]
            for one in range(first, steps_per_epoch)
        ]
        for batch in DataLoader(training.samples, batch_sampler=shares):
            training.step(parallel, training.optimizer, batch)
            step += 1
            if rank == 0:
                notebook.note("trained", step=step, samples=step * GLOBAL_BATCH)
            if rank == 0 and step % CHECKPOINT_STEPS == 0:
                state = {
                    "step": step,
                    "model": training.model.state_dict(),
                    "optimizer": training.optimizer.state_dict(),
                }
                torch.save(state, unfinished)
                os.replace(unfinished, checkpoint)
                notebook.note("saved", step=step)


CONTESTANTS = (
    Contestant(name=RINGPS, command=ringps_command, useful=ringps_useful, lost=ringps_lost),
    Contestant(name=TORCHRUN, command=torchrun_command, useful=torchrun_useful, lost=torchrun_lost),
)


# What is measured.


def measure(
    contestant: Contestant, options: argparse.Namespace, seconds: float, kills: bool
) -> tuple[Run, int]:
    """Let a contestant train for so long after it has warmed up; what it did, and its parameters' size."""
    chance = random.Random(options.seed)
    run = Run(seconds)
    killed_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ringps-goodput-") as name, WatchedJob(Path(name)) as job:
        job.start(contestant.command(options, job.directory))
        job.wait(lambda: _newest_step(job) >= _WARM_STEPS, 180.0, f"{_WARM_STEPS} steps")
        size_bytes = int(job.of("ready")[0].details["parameter_bytes"])
        start_s = time.monotonic()
        before = contestant.useful(job, start_s, killed_s)
        due_s = [start_s + number * options.every for number in range(1, int(seconds / options.every) + 1)]
        due_s = [one for one in due_s if kills and one < start_s + seconds - 1]
        while (now_s := time.monotonic()) < start_s + seconds:
            if due_s and now_s >= due_s[0]:
                due_s.pop(0)
                if _kill(job, chance.randrange(options.workers)):
                    killed_s.append(now_s)
            if run.ended_s is None and job.over:
                run.ended_s, run.said = round(now_s - start_s, 1), job.log()
            time.sleep(0.05)
        now_s = time.monotonic()
        points_s = [start_s + point for point in range(1, int(seconds))] + [now_s]
        run.seconds = now_s - start_s
        run.curve = [
            (round(point_s - start_s, 2), contestant.useful(job, point_s, killed_s) - before)
            for point_s in points_s
        ]
        run.kills = len(killed_s)
        run.steps_lost = contestant.lost(job, now_s, contestant.useful(job, now_s, killed_s))
    return run, size_bytes


def _newest_step(job: WatchedJob) -> int:
    return max((int(note.details["step"]) for note in job.of("trained")), default=0)


def _kill(job: WatchedJob, slot: int) -> bool:
    """Kill the worker in that place or, if there is none, in the next; whether there was any."""
    alive = {note.worker_id: note.pid for note in job.of("started") if runs(note.pid)}
    after = sorted(alive, key=lambda worker_id: (worker_id < slot, worker_id))
    for worker_id in after:
        with contextlib.suppress(ProcessLookupError):
            os.kill(alive[worker_id], signal.SIGKILL)
            return True
    return False


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Both contestants, in turns: without kills and with."""
    runs_of: dict[tuple[str, str], Run] = {}
    rows = []
    for op, seconds in (
        (WITHOUT_KILLS, options.quiet_seconds or options.seconds),
        (WITH_KILLS, options.seconds),
    ):
        for contestant in CONTESTANTS:
            if contestant.name not in options.contestants:
                continue
            before = load()
            run, size_bytes = measure(contestant, options, seconds, op == WITH_KILLS)
            runs_of[contestant.name, op] = run
            print(
                f"goodput: {contestant.name}, {op.replace('_', ' ')}: {run.rate:.1f} samples/s, "
                f"{run.kills} kills, {run.steps_lost} steps lost",
                file=sys.stderr,
                flush=True,
            )
            if run.said:
                print(f"goodput: it ended by itself after {run.ended_s} s:\n{run.said}", file=sys.stderr)
            quiet = runs_of[contestant.name, WITHOUT_KILLS]
            rows.append(_row(contestant.name, op, run, quiet, size_bytes, options, (before, load())))
    return rows


def _row(
    name: str,
    op: str,
    run: Run,
    quiet: Run,
    size_bytes: int,
    options: argparse.Namespace,
    loads: tuple[float, float],
) -> Row:
    facts: dict[str, object] = {
        "transport": "auto" if name == RINGPS else "gloo",
        "model": options.model,
        "global_batch": GLOBAL_BATCH,
        "seconds": round(run.seconds, 1),
        "kills": run.kills,
        "useful_samples": run.samples,
        "samples_per_s": round(run.rate, 2),
        "steps_lost": run.steps_lost,
        "goodput": round(run.rate / quiet.rate, 4) if op == WITH_KILLS and quiet.samples else None,
        "ended_after_s": run.ended_s,
        "load_1m": max(loads),
        "curve": run.curve,
    }
    steps = max(run.samples, 1) / GLOBAL_BATCH
    return report.row(
        bench="goodput",
        backend=name,
        op=op,
        size_bytes=size_bytes,
        dtype="float32",
        world_size=options.workers,
        times_s=[run.seconds / steps],
        facts=facts,
    )


def table(rows: Sequence[Row]) -> Table:
    """A line per run."""
    titles = (
        "backend",
        "op",
        "n",
        "seconds",
        "kills",
        "samples/s",
        "steps lost",
        "goodput",
        "ended after",
        "load",
    )
    names = ("seconds", "kills", "samples_per_s", "steps_lost", "goodput", "ended_after_s", "load_1m")
    lines = [
        (one.backend, one.op, str(one.world_size), *(_cell(one.env[name]) for name in names)) for one in rows
    ]
    return Table(titles, lines)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Useful samples per second while workers are killed.")
    add = parser.add_argument
    add("-n", "--workers", type=int, default=4)
    add("--seconds", type=float, default=40.0, help="to train with kills (default: 40)")
    add("--quiet-seconds", type=float, help="to train without (default: as long)")
    add("--every", type=float, default=15.0, metavar="S", help="from one kill to the next (default: 15)")
    names = [contestant.name for contestant in CONTESTANTS]
    add("--contestants", type=lambda text: text.split(","), default=names, help=f"of {', '.join(names)}")
    add("--model", default="gpt-small", choices=elastic_job.WORKLOADS)
    add("--seed", type=int, default=0, help="of whom to kill")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--plot", type=Path, metavar="FILE", help="draw a plot there")
    add("--work", type=Path, help=argparse.SUPPRESS)
    add("--as", dest="role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        (train_ddp if options.role == TORCHRUN else elastic_job.train)(options.work, options.model)
        return
    if options.plot:
        report.load_pyplot()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        rows = rows_of(options)
    except JobError as error:
        sys.exit(f"goodput.py: {error}")
    print(table(rows).text(), flush=True)
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.goodput(rows), options.plot)


if __name__ == "__main__":
    main()
