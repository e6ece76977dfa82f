"""From the SIGKILL of a worker that trains on a GPU to the next committed step.

    python benchmarks/gpu_recovery.py -n 4 --json FILE

As recovery.py does it: a job trains while this process kills a worker, each in turn, at a random moment of a
step; all workers share GPU 0. What a loss costs is the time to the survivors' next commit, less a normal step
of the same run. A replacement joins before the next kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import elastic_job
import gpu_device
import gpu_report
from gpu_report import GpuRow
from harm import harm
from ringps import worker_env
from watched_job import JobError, WatchedJob, load, run_command

_BAR_S = 1.0
_STEADY_STEPS = 8
_JOIN_LIMIT_S = 60.0
_SEED = 0


def measure(options: argparse.Namespace, directory: Path) -> GpuRow:
    """The row of one job.

    Raises:
        JobError: it did not go as it must.
    """
    n, draw = options.workers, random.Random(_SEED)
    rehearse = ["--rehearse"] if options.rehearse else []
    arguments = ["--model", options.model, "--json", str(options.json), *rehearse]
    ring = ["--min-workers", "1", "--max-restarts", "100", "--transport", options.transport]
    times_s, above_s, steps_s, victims = [], [], [], list[int]()
    with WatchedJob(directory) as job:
        job.start(run_command(__file__, directory, arguments, workers=n, options=ring))
        for _ in range(options.repeats):
            step_s = job.steady(n, _STEADY_STEPS, limit_s=_JOIN_LIMIT_S)
            victims = victims or draw.sample(sorted(job.members()), n)
            pid = job.members()[victims.pop()]
            time.sleep(draw.uniform(0, step_s))
            next_step_s = harm(job, partial(os.kill, pid, signal.SIGKILL)).next_step_s()
            times_s.append(next_step_s)
            steps_s.append(step_s)
            above_s.append(next_step_s - step_s)
            print(f"gpu_recovery: {next_step_s:.3f} s, a step {step_s:.4f} s", file=sys.stderr, flush=True)
        size_bytes = int(job.of("ready")[0].details["parameter_bytes"])
    return gpu_report.measured(
        "sigkill to next step",
        backend=f"ringps, {options.transport}",
        size_bytes=size_bytes,
        dtype="float32",
        world_size=n,
        times_s=times_s,
        rehearsal=options.rehearse,
        bar=_BAR_S,
        reached_s=max(above_s),
        facts={
            "model": options.model,
            "step_ms": round(1e3 * statistics.median(steps_s), 2),
            "above_step_ms": round(1e3 * statistics.median(above_s), 2),
            "above_step_ms_max": round(1e3 * max(above_s), 2),
            "load_1m": load(),
        },
    )


def train(options: argparse.Namespace) -> None:
    """As one of the workers."""

    def place() -> gpu_device.Card:
        return gpu_device.card(options.rehearse)

    elastic_job.train(options.work, options.model, place=place)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recovery of training on a GPU from SIGKILL.")
    gpu_device.add_options(parser)
    add = parser.add_argument
    add("-n", "--workers", type=int, default=2)
    add("--repeats", type=int, default=5)
    add("--model", choices=elastic_job.WORKLOADS, default="gpt-small")
    add("--transport", default="auto")
    add("--work", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if worker_env.read() is not None:
        train(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ringps-gpu-") as name:
        try:
            row = measure(options, Path(name))
        except JobError as error:
            sys.exit(f"gpu_recovery.py: {error}")
    gpu_report.write(options.json, [row])


if __name__ == "__main__":
    main()
