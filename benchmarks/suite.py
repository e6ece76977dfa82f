"""Run the benchmarks one after the other, and write their page.

    python benchmarks/suite.py                      # all of them, below 10 minutes, and docs/benchmarks.md
    python benchmarks/suite.py --only train -n 2    # a part of them, and no page
    python benchmarks/suite.py --full               # recovery, goodput and checkpoint at length

Results are kept as JSON in benchmarks/out. The page is written when no size, transport or time was chosen
and there are results of all benchmarks, so that it always shows whole runs; `python benchmarks/page.py`
writes it from what is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("allreduce", "train", "hosts", "simulate", "recovery", "goodput", "checkpoint")
WITH_OPTIONS = ("allreduce", "train")
"""Those that take `-n` and `--transport`."""
AS_ROOT = ("hosts",)
SHORT = {
    "recovery": ("--repeats=2", "--turns=1"),
    "goodput": ("--seconds=40", "--quiet-seconds=15"),
    "checkpoint": ("--seconds=8", "--pairs=3"),
}
FULL = {
    "recovery": ("--repeats=5", "--turns=3"),
    "goodput": ("--seconds=180",),
    "checkpoint": ("--seconds=60", "--pairs=12"),
}
"""What scripts are told without and with `--full`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="All benchmarks, and the page. What is chosen here applies to allreduce and train.",
    )
    add = parser.add_argument
    add("--only", type=_names, metavar="NAME,NAME", help=f"of {', '.join(SCRIPTS)}")
    add("-n", "--workers", metavar="N,N", help="world sizes (default: 2,4)")
    add("--transport", metavar="NAME,NAME", help="tcp, shm or auto (default: what the script takes)")
    add("--seconds", metavar="S", help="about how long to measure each point")
    add("--full", action="store_true", help="goodput for 3 minutes each, the rest with more repetitions")
    options = parser.parse_args()
    chosen = [
        f"--{name}={value}"
        for name in ("workers", "transport", "seconds")
        if (value := getattr(options, name)) is not None
    ]
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    names = options.only or list(SCRIPTS)
    for name in names:
        (out / f"{name}.json").unlink(missing_ok=True)  # what fails now must not look done

    start_s = time.monotonic()
    failed = []
    for name in names:
        if name in AS_ROOT and os.geteuid() != 0:
            _say(f"SKIPPED {name}: it makes network namespaces, which needs root")
            continue
        script = HERE / f"{name}.py"
        if not script.exists():
            _say(f"SKIPPED {name}: there is no {script}")
            continue
        _say(f"{name}:")
        arguments = [
            *(chosen if name in WITH_OPTIONS else ()),
            *(FULL if options.full else SHORT).get(name, ()),
        ]
        result = str(out / f"{name}.json")
        code = subprocess.run(
            [sys.executable, str(script), "--json", result, *arguments], check=False
        ).returncode
        _say(f"{name}: {time.monotonic() - start_s:.0f} s since the start")
        if code:
            failed.append(name)
            _say(f"FAILED {name}: exit code {code}")
    lacking = [name for name in SCRIPTS if not (out / f"{name}.json").exists()]
    if lacking and options.only:
        _say(f"no page, for there are no results of {', '.join(lacking)}")
    elif not chosen:
        code = subprocess.run([sys.executable, str(HERE / "page.py")], check=False).returncode
        if code:
            failed.append("page")
    if failed:
        sys.exit(f"bench: failed: {', '.join(failed)}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    return names


if __name__ == "__main__":
    main()
