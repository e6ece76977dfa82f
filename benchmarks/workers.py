"""What the measuring scripts have in common: they start themselves as workers, and measure in turns."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import report
import ringps
from ringps import worker_env


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long to measure one point."""

    seconds: float
    """About so long, whatever happens between the timed regions included."""
    min_repeats: int
    max_repeats: int


def run(
    script: str, world_size: int, transport: str, arguments: Sequence[str], *, fixed: bool = False
) -> list[report.Row]:
    """Run a script under `ringps run`; the rows that its rank 0 writes to `--json FILE`.

    Args:
        script: its path.
        world_size: number of workers.
        transport: as of `ringps run`.
        arguments: the script's.
        fixed: the ring cannot do without any of them.

    Raises:
        SystemExit: a worker failed; with its exit code.
    """
    print(f"{world_size} workers, transport {transport}:", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "ringps_launcher", "run", "-n", str(world_size)]
        command += [f"--min-workers={world_size}"] if fixed else []
        command += ["--transport", transport, script, "--json", str(rows)]
        code = subprocess.run([*command, "--quiet", *arguments], check=False).returncode
        if code:
            sys.exit(code)
        return report.read_json(rows)


def collect(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    script: str,
    work: Callable[[argparse.Namespace], list[report.Row]],
    arguments: Sequence[str],
) -> list[report.Row]:
    """As a worker, what `work` measures (rows on rank 0); else that of workers, of each size and transport.

    Args:
        parser: for errors in `options`.
        options: has what `add_options` added.
        script: the measuring script.
        work: measures as one of the workers.
        arguments: the script's own for its workers, beside the limits.
    """
    env = worker_env.read()
    if env is not None:
        if options.workers:
            parser.error("under `ringps run` its -n is the world size")
        options.transport = [env.transport]
        return work(options)
    rows: list[report.Row] = []
    for world_size in options.workers or [2, 4]:
        for transport in options.transport:
            rows += run(script, world_size, transport, [*limit_arguments(options), *arguments])
    return rows


def take_turns(turns: Sequence[Callable[[], float]], warm_rounds: int, limits: Limits) -> list[list[float]]:
    """Call all `turns` in rounds, each round starting with the next of them. Collective.

    Args:
        turns: each waits for the other ranks, then times something and returns seconds.
        warm_rounds: come first and do not count; the last of them says how many rounds there is time for.

    Returns:
        For each of the turns its times in seconds, in each round that of the slowest rank.
    """
    for _ in range(warm_rounds):
        start_s = time.perf_counter()
        for turn in turns:
            turn()
        round_s = time.perf_counter() - start_s
    slowest = torch.tensor([round_s], dtype=torch.float64)
    ringps.all_reduce(slowest, "max")
    repeats = int(limits.seconds / slowest.item())
    repeats = min(max(repeats, limits.min_repeats), limits.max_repeats)
    times_s = torch.zeros(repeats, len(turns), dtype=torch.float64)
    for repetition in range(repeats):
        for place in range(len(turns)):
            column = (repetition + place) % len(turns)
            times_s[repetition, column] = turns[column]()
    ringps.all_reduce(times_s, "max")
    return [list(times) for times in times_s.T.tolist()]


def add_options(
    parser: argparse.ArgumentParser,
    *,
    transports: list[str],
    seconds: float,
    min_repeats: int,
    max_repeats: int,
) -> None:
    """What every measuring script can be told."""
    add = parser.add_argument
    add("-n", "--workers", type=numbers, metavar="N,N", help="world sizes (default: 2,4)")
    add(
        "--transport",
        type=lambda text: text.split(","),
        default=transports,
        metavar="NAME,NAME",
        help=f"tcp, shm or auto; one run for each (default: {','.join(transports)})",
    )
    add("--seconds", type=float, default=seconds, help="about how long to measure each point")
    add("--min-repeats", type=int, default=min_repeats)
    add("--max-repeats", type=int, default=max_repeats)
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--plot", type=Path, metavar="FILE", help="draw a plot there")
    add("--quiet", action="store_true", help="print no table")


def limits(options: argparse.Namespace) -> Limits:
    """As chosen."""
    return Limits(seconds=options.seconds, min_repeats=options.min_repeats, max_repeats=options.max_repeats)


def limit_arguments(options: argparse.Namespace) -> list[str]:
    """What hands the chosen limits on to workers."""
    names = ("seconds", "min_repeats", "max_repeats")
    return [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]


def numbers(text: str) -> list[int]:
    """ "2,4" -> [2, 4]"""
    return [int(part) for part in text.split(",")]
