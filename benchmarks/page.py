"""Write docs/benchmarks.md, with its plots, from the JSON that the benchmarks wrote.

    python benchmarks/page.py                           # from benchmarks/out/*.json

It prints what was measured and nothing else. A benchmark without a JSON file has no section, and the page
says that it is missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint_report
import goodput
import plots
import recovery_report
import report
from report import Row, Table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says about one benchmark."""

    name: str
    """Of the JSON file, and of the script."""
    title: str
    text: str
    table: Callable[[Sequence[Row]], str]
    """In Markdown."""
    plot: Callable[[Sequence[Row]], Any | None] | None = None
    alt: str = ""
    """What the plot shows."""


def facts(rows: Sequence[Row]) -> str:
    """A line per row, with a column for whatever is particular to these rows, and what they share below."""
    known = set(report.environment())
    names = [name for name in dict.fromkeys(name for one in rows for name in one.env) if name not in known]
    # Lists and the like would make no column.
    names = [name for name in names if all(_is_plain(one.env.get(name)) for one in rows)]
    shared = {name: rows[0].env.get(name) for name in names if len({one.env.get(name) for one in rows}) == 1}
    names = [name for name in names if name not in shared]
    lines = [
        (
            one.op,
            one.backend,
            str(one.world_size),
            report.human_bytes(one.bytes),
            f"{one.time_us / 1e3:.4g}",
            *(_cell(one.env.get(name)) for name in names),
        )
        for one in rows
    ]
    titles = ("op", "backend", "n", "size", "time ms", *(name.replace("_", " ") for name in names))
    text = Table(titles, lines).markdown()
    if shared:
        said = ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in shared.items())
        text += f"\n\nIn all of these: {said}."
    return text


def predictions(rows: Sequence[Row]) -> str:
    """Training steps, and measured points with their prediction if there are any."""
    measured = [one for one in rows if one.backend == "measured"]
    steps = [one for one in rows if one.op == "train_step"]
    return "\n\n".join(facts(chosen) for chosen in (steps, measured) if chosen)


SECTIONS = (
    Section(
        name="allreduce",
        title="All-reduce",
        text="""\
Sums of float32 tensors, in place, against gloo in the same processes. `ringps-tcp` sends over loopback
TCP, `ringps-shm` goes through the memory of the machine with any tensor, and `ringps-shm-empty` is the
same with a tensor from `ringps.empty`, which the other ranks read without a copy. A process has one
transport, so each transport is a run of its own with gloo beside it; *vs gloo* compares within a run.
Every result was checked to be the exact sum.""",
        table=lambda rows: report.bandwidths(rows, "gloo").markdown(),
        plot=plots.bandwidths,
        alt="Bus bandwidth of all_reduce by size, for each backend and world size",
    ),
    Section(
        name="train",
        title="Training steps",
        text="""\
`gpt` is a decoder-only transformer of 7.2 million parameters in 112 tensors, `mlp` twelve linear layers
with 50.4 million parameters in 24. Batches are small, so that there is little computation to hide
communication behind: this is the hard case. *Added* is the median step less the median step without
communication (`none`). *Best DDP adds* is what the better of `ddp` (PyTorch's DistributedDataParallel
over gloo, as it is by default) and `ddp-view` (the same with `gradient_as_bucket_view=True`) adds, as a
multiple of what the line's backend adds: above 1, the line's backend adds less. *Extra memory* is the peak
per worker beyond plain PyTorch, in multiples of the gradients' size, from runs of one variant each; memory
that workers share is counted once.

In every run the parameters were bitwise equal on all ranks in the end, and the losses of the first three
steps those of DDP to 1e-4.""",
        table=lambda rows: report.steps(rows).markdown(),
        plot=plots.added_time,
        alt="Time that communication adds to a training step, for each model, world size and backend",
    ),
    Section(
        name="hosts",
        title="Several hosts, limited links",
        text="""\
Hosts are network namespaces of one machine, and their links are limited in both directions by `tc tbf`.
What the links allow, not what the cores do, decides here. *Share of link* is what the busiest host would
have sent in a flat ring, payload alone, as a part of the link's rate; an algorithm that sends less
between hosts can exceed 1. The plain TCP stream was measured in the same run.""",
        table=facts,
    ),
    Section(
        name="simulate",
        title="Simulated",
        text="""\
Predicted, not measured, by a model of links and processors that executes the library's own schedules; its
costs were fitted on a small machine. *Efficiency* is the time of a step's computation as a part of the
whole step. [How the model works, and how well it predicts](simulation.md); all_reduce by size is in the
script's output.""",
        table=predictions,
        plot=plots.efficiency,
        alt="Predicted efficiency of training by number of workers",
    ),
    Section(
        name="recovery",
        title="Recovery",
        text="""\
What it takes to go on when a worker is killed (`sigkill`), frozen (`sigstop`) or asked to leave (`sigterm`),
when a connection between two live processes closes (`cut`), when nothing comes through between two hosts
any more (`silent_link`) or from one of them (`silent_host`), and when a worker joins. Each is done at a
random moment of a step, and times are from then: until the kernel has ended the process (`gone`), until the
coordinator says so or the first member is told of the next generation (`noticed`), until the last survivor
has committed its first step of the next generation (`next_step`). A `pause` is the longest time between two
commits of a process that stays. *Above a step* is the median without a normal step of the same run, *at
most* the same of the worst; the *bar* is for that. *Load* is the machine's, of the last minute.

A joining worker's time is that from the start of its process to its first committed step: `start` until it
has loaded PyTorch and its data, `wait` until the members serve their state, `fetch`, and `first_step`.
`commit_*` is time inside a step that a ring needs which can lose members: hashes of the reduced buckets, an
account of which samples took part, and the vote; their clock time has waiting for the other ranks in it.
`commit_parameters` comes with every `check_parameters_every`-th step only. `step_elastic` and `step_fixed`
are whole steps of jobs with and without all that, in turns.""",
        table=recovery_report.markdown,
        plot=plots.recovery,
        alt="Time to notice, to recover and to join, by what happened",
    ),
    Section(
        name="goodput",
        title="Goodput",
        text="""\
The same model, samples and global batch under `ringps run` and under torchrun with DDP over gloo, with a
SIGKILL of a worker every 15 s on the same schedule, and without. torchrun starts all workers anew after a
loss; they resume from a checkpoint that is written every 10 steps. A sample is useful if its step was not
lost; *goodput* is useful samples per second with kills by those without.""",
        table=lambda rows: goodput.table(rows).markdown(),
        plot=plots.goodput,
        alt="Useful samples over time, with a worker killed every 15 s, and without",
    ),
    Section(
        name="checkpoint",
        title="Checkpoints",
        text="""\
The parameters of a GPT and AdamW's moments, saved and restored by ringps, by `torch.save` and, in a ring of
one, by PyTorch's Distributed Checkpoint (`dcp`), to the same disk. A ring of one has a thread for each core,
others one thread for each rank. *Ceiling* is the time as a multiple of what nobody can be faster than: a
`copy` of as many bytes into memory that is there, a `write` with fsync, each rank its part; a `read` of
everything by every rank.

- `save_stall` is how long a save holds up training: for ringps, what it adds to the time from one step to the
  next, and *own count* what it says itself. With `torch.save` rank 0 saves and the others wait. `dcp-async`
  is the time until `async_save` returns, with new memory for each save and (`dcp-async-kept`) with that of
  the one before, as ringps has it.
- `save_durable` lasts until the checkpoint is whole and synced to the disk and the one before is gone;
  nothing else goes on.
- `restore` lasts until the state is in memory; what is read is in the system's cache. All ranks want all of
  it: each rank of ringps reads a part, checks its hash and sends it to the others, while each loads the whole
  file with `torch.load`. `restore_into_model` lasts until it is in the model and the optimizer, too; it was
  compared with what had been saved, bit by bit.
- `train_step` is real training, with a save every so many steps (`ringps-saving`) and without, in blocks of
  steps that take turns; checkpoints go to memory (a tmpfs) or to the disk. *Lost* is the part of the speed
  that saves cost: the median of pairs of blocks, and the least and the most.""",
        table=checkpoint_report.markdown,
        plot=plots.checkpoints,
        alt="Time that a save holds up training, until it is on the disk, and to restore it",
    ),
)

HOW_TO_READ = """\
## How to read this

- *Bus bandwidth* (busbw) is what the busiest link had to carry: for all_reduce of S bytes among n ranks
  2(n - 1)/n * S / time, as [nccl-tests](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)
  define it. It does not depend on n if every link is used as well as can be. *Algorithm bandwidth* (algbw)
  is S / time. GB/s are 10^9 bytes per second, sizes are powers of two.
- Times are *medians*: on a machine that does other things too, a few repetitions meet something else,
  and a mean would tell of that. `min` and `max` are there to show how much it was. Each repetition counts
  as long as its slowest rank.
- What is compared ran in the same run, in turns from one repetition to the next. Numbers of different
  runs, also of different tables of this page, do not compare as well.
- Workers have one thread of computation each. More workers than cores take turns on the cores: then the
  time is that of all the work that they do together, and bandwidth falls with n for every backend.
- Differences of a few percent are noise here: look at a second run before you believe in them."""


def write(folder: Path, page: Path, *, draw: bool = True) -> list[str]:
    """Write the page and its plots, beside it in a folder of its name.

    Args:
        folder: holds `NAME.json` for each section's benchmark.
        page: the Markdown file.
        draw: whether to draw plots; needs matplotlib.

    Returns:
        The names of the benchmarks that have no JSON there.

    Raises:
        SystemExit: there is no JSON at all, or no matplotlib.
    """
    found = {
        section.name: report.read_json(folder / f"{section.name}.json")
        for section in SECTIONS
        if (folder / f"{section.name}.json").exists()
    }
    if not any(found.values()):
        sys.exit(f"there is no JSON of any benchmark in {folder}; run `make bench`")
    page.parent.mkdir(parents=True, exist_ok=True)
    images = page.with_suffix("")
    parts = [
        "# Benchmarks",
        "Written by `make bench`, from one run of each script in `benchmarks/`. Do not edit: "
        "`python benchmarks/page.py` overwrites it.",
        HOW_TO_READ,
    ]
    for section in SECTIONS:
        image = images / f"{section.name}.svg"
        image.unlink(missing_ok=True)  # of another run
        if not found.get(section.name):
            continue
        rows = found[section.name]
        parts += [f"## {section.title}", section.text, conditions(section.name, rows)]
        figure = section.plot(rows) if draw and section.plot else None
        if figure is not None:
            images.mkdir(exist_ok=True)
            plots.save(figure, image)
            parts.append(f"![{section.alt}]({images.name}/{image.name})")
        parts.append(section.table(rows))
    missing = [section.name for section in SECTIONS if not found.get(section.name)]
    if missing:
        names = ", ".join(f"`benchmarks/{name}.py`" for name in missing)
        parts += ["## Missing", f"There was no result of {names}."]
    page.write_text("\n\n".join(parts) + "\n")
    return missing


def conditions(name: str, rows: Sequence[Row]) -> str:
    """The command, the noise, the machine and the software of a section."""
    known = report.environment()
    machines = list(dict.fromkeys(tuple((key, one.env.get(key)) for key in known) for one in rows))
    said = []
    for machine in machines:
        env = dict(machine)
        said.append(
            f"{env['cores']} cores of {env['cpu']}, Linux {env['kernel']}, Python {env['python']}, "
            f"torch {env['torch']}, pyzmq {env['pyzmq']}, libzmq {env['libzmq']}; commit {env['commit']}"
        )
    repeats = sorted({one.repeats for one in rows})
    command = f"`python benchmarks/{name}.py`"
    if repeats[-1] > 1:
        noise = statistics.median(one.time_us_max / one.time_us_min for one in rows)
        command += (
            f", {repeats[0]} to {repeats[-1]} repetitions, of which the slowest took {noise:.1f} times as "
            "long as the fastest (median of all lines: how quiet the machine was)"
        )
    return f"{command}. {'. '.join(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(description="The page of the benchmarks, from their JSON.")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "out", help="the JSON files' folder"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--no-plots", action="store_true", help="do without matplotlib")
    options = parser.parse_args()
    if not options.no_plots:
        report.load_pyplot()
    missing = write(options.json, options.page, draw=not options.no_plots)
    print(f"wrote {options.page}", file=sys.stderr)
    for name in missing:
        print(f"it has no section of {name}: {options.json / name}.json is missing", file=sys.stderr)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
