"""What does a checkpoint cost: how long does it hold up training, and how soon is it safe, and back?

    python benchmarks/checkpoint.py                     # 400 MB, rings of 1, 2 and 4
    python benchmarks/checkpoint.py --megabytes 2000 -n 1 --directory /mnt/disk

A GPT with AdamW's moments is saved and restored by ringps, by torch.save and by PyTorch's Distributed
Checkpoint (DCP), on the same disk and in turns. Beside each is what bounds it: a copy of as many bytes into
memory that is there (`save_stall`), a write with fsync (`save_durable`), a read (`restore`). Of those each
rank has its part, but of reads, where each wants everything. A ring of one has a thread for each core, others
one thread for each rank.

- `save_stall`: until training goes on. ringps: what a save adds to the time from one step to the next. With
  torch.save rank 0 saves and the others wait. `dcp-async` is until `async_save` returns; with
  `dcp-async-kept` it has memory from the save before, as ringps has.
- `save_durable`: until the checkpoint is whole and on the disk, and the one before is gone.
- `restore`: until the state is in memory, of files in the system's cache. ringps checks all hashes.
  `restore_into_model`: until it is in the model and the optimizer too.
- `train_step`: real training with a save every few steps and without any, in blocks that take turns. *Lost*
  is what saves cost of a step, as the median of pairs of blocks.

Everything that is restored must be what was saved, to the last bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import checkpoint_report
import checkpoint_steps
import checkpoint_turns
import plots
import report
import ringps
import workers
from checkpoint_turns import RINGPS, STALL, Turn
from ringps import worker_env

_WARM_ROUNDS = 2
PARTS = ("state", "steps")
_SHM = Path("/dev/shm")
_ROOM = 6
"""Checkpoints for which there must be room in memory."""


def work_state(options: argparse.Namespace) -> list[report.Row]:
    """Save and restore, as one of the workers."""
    world_size = ringps.world_size()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if world_size == 1 else 1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # of DCP: it is meant
    subject = checkpoint_turns.subject(options.megabytes)
    size_bytes, checkpoints = subject.size_bytes, options.directory / "checkpoints"
    limits = workers.limits(options)

    def measure(turns: list[Turn]) -> list[report.Row]:
        times_s = workers.take_turns([turn.run for turn in turns], _WARM_ROUNDS, limits)
        return [
            report.row(
                bench="checkpoint",
                backend=turn.backend,
                op=turn.op,
                size_bytes=size_bytes,
                dtype="float32",
                world_size=world_size,
                times_s=times,
                facts={"transport": options.transport},
            )
            for turn, times in zip(turns, times_s, strict=True)
        ]

    how: dict[str, Any] = {"saving": ringps.Saving(final=False), "retention": ringps.Retention(keep=1)}
    with ringps.Checkpointer(checkpoints, subject.state, **how) as keeper:
        saves = checkpoint_turns.Saves(subject, keeper, options.directory)
        rows = measure(saves.turns())
    stalls_s = torch.tensor(saves.own_stall_s[_WARM_ROUNDS:], dtype=torch.float64)
    ringps.all_reduce(stalls_s, "max")
    for one in rows:
        if (one.op, one.backend) == (STALL, RINGPS):
            one.env["own_ms"] = round(statistics.median(stalls_s.tolist()) * 1e3, 2)
    del saves
    return rows + measure(checkpoint_turns.Restores(subject, checkpoints, options.directory).turns())


def work_steps(options: argparse.Namespace) -> list[report.Row]:
    """Train with saves and without, as one of the workers."""
    torch.set_num_threads(1)
    plan = checkpoint_steps.Plan(every=options.every, saves=options.block_saves, pairs=options.pairs)
    return checkpoint_steps.measure(
        options.model, options.place, options.directory / "checkpoints", plan, options.transport
    )


def work(options: argparse.Namespace) -> list[report.Row]:
    """Measure as one of the workers; rank 0 gets the rows."""
    ringps.init()
    rows = {"state": work_state, "steps": work_steps}[options.part](options)
    leads = ringps.rank() == 0
    ringps.shutdown()
    return rows if leads else []


def collect(options: argparse.Namespace) -> list[report.Row]:
    """The rows of all jobs, one after the other."""
    rows = []
    if "state" in options.parts:
        for world_size in options.workers or [1, 2, 4]:
            rows += _run(
                options, world_size, options.directory, "state", [f"--megabytes={options.megabytes}"]
            )
    if "steps" in options.parts:
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _PLANNED]
        for place, directory in _places(options.directory, options.model).items():
            rows += _run(options, 2, directory, "steps", [*arguments, f"--place={place}"])
    return rows


_PLANNED = ("model", "every", "block_saves", "pairs")


def _run(
    options: argparse.Namespace, world_size: int, directory: Path, part: str, arguments: list[str]
) -> list[report.Row]:
    with tempfile.TemporaryDirectory(prefix="ringps-checkpoint-", dir=directory) as name:
        chosen = [*workers.limit_arguments(options), f"--part={part}", f"--directory={name}", *arguments]
        # In a fixed ring there is something between two steps without any training in them.
        return workers.run(__file__, world_size, options.transport, chosen, fixed=part == "state")


def _places(disk: Path, model: str) -> dict[str, Path]:
    """File systems by what to call them: memory, if there is one with room, and the disk."""
    built = checkpoint_steps.MODELS[model].build()
    needed_bytes = _ROOM * 3 * sum(parameter.nbytes for parameter in built.parameters())
    if not _SHM.is_dir():
        print(f"SKIPPED memory: there is no {_SHM}", file=sys.stderr)
    elif (free_bytes := shutil.disk_usage(_SHM).free) < needed_bytes:
        print(
            f"SKIPPED memory: {_SHM} has {free_bytes / 1e6:.0f} MB free, and {needed_bytes / 1e6:.0f} are "
            "needed",
            file=sys.stderr,
        )
    else:
        return {"memory": _SHM, "disk": disk}
    return {"disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description="Saving and restoring: ringps, torch.save and DCP.")
    add = parser.add_argument
    add("-n", "--workers", type=workers.numbers, metavar="N,N", help="of the state's rings (default: 1,2,4)")
    add("--transport", default="auto", help="tcp, shm or auto (default: auto)")
    add(
        "--seconds", type=float, default=25.0, help="about how long to measure each ring's saves, or restores"
    )
    add("--min-repeats", type=int, default=3)
    add("--max-repeats", type=int, default=20)
    add("--megabytes", type=float, default=400.0, help="of the state; 10^6 bytes (default: 400)")
    add("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to save (a temporary one)")
    parts = f"of {', '.join(PARTS)}"
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), metavar="PART,PART", help=parts)
    add("--model", choices=checkpoint_steps.MODELS, default="gpt-batch4", help="what to train")
    add("--every", type=int, default=10, help="steps from one save to the next (default: 10)")
    add("--block-saves", type=int, default=2, help="saves in a block of steps (default: 2)")
    add("--pairs", type=int, default=8, help="of blocks, one with saves and one without (default: 8)")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    add("--plot", type=Path, metavar="FILE", help="draw a plot there")
    add("--quiet", action="store_true", help="print no table")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    add("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot:
        report.load_pyplot()  # not after minutes of measuring
    if worker_env.read() is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and remove what was written
        rows = collect(options)
    elif options.part is None:
        parser.error("it starts its workers itself: run it without `ringps run`")
    else:
        rows = work(options)
    if not rows:
        return
    if not options.quiet:
        print(checkpoint_report.table(rows).text())
        print("\n".join(checkpoint_report.verdicts(rows)), flush=True)
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.checkpoints(rows), options.plot)


if __name__ == "__main__":
    main()
