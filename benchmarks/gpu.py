"""What GPUs can do, and how near ringps comes to it: kernels, collectives, recovery, training steps.

    python benchmarks/gpu.py                            # writes benchmarks/results/gpu-NAME-DATE.json
    python benchmarks/gpu.py --only all_reduce,step
    python benchmarks/gpu.py --rehearse                 # everything at tiny sizes, on a pretended GPU

Each part is a process, or a job of processes, of its own, with a time limit. One that fails leaves a row that
says why, and the others go on; the exit code is 1 then. A bar that is not reached is no failure. All parts
need nothing but this repository and the Python that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # ringps need not be installed

import gpu_device
import gpu_report
from gpu_report import GpuRow

HERE = Path(__file__).resolve().parent
_GRACE_S = 15.0
_NO_DEVICE = "there is no GPU that torch can use"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A script of its own."""

    name: str
    """As `--only` takes it."""
    script: str
    limit_s: float
    world_size: int = 1
    ring: tuple[str, ...] = ()
    """Options of `ringps run`; none: it is run by itself."""
    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 1
    """How many it needs."""
    beside: bool = False
    """Others' means, which not every machine has: it is no failure if they do not work."""

    @property
    def title(self) -> str:
        """What is said of it as a whole."""
        return " ".join((self.name, *self.arguments, *self.ring))


def _ring_of(n: int, transport: str) -> tuple[str, ...]:
    return ("-n", str(n), "--min-workers", str(n), "--transport", transport)


def _all_reduces(n: int, transport: str, limit_s: float, *, name: str = "all_reduce", gpus: int = 1) -> Part:
    ring = _ring_of(n, transport)
    script = "gpu_all_reduce.py"
    return Part(name=name, script=script, limit_s=limit_s, world_size=n, ring=ring, gpus=gpus)


def _by_torch(n: int, by: str, environ: Mapping[str, str], *, gpus: int = 1) -> Part:
    return Part(
        name="torch",
        script="gpu_symmetric.py",
        limit_s=40.0,
        world_size=n,
        ring=_ring_of(n, "auto"),
        arguments=("--by", by),
        environ=environ,
        gpus=gpus,
        beside=True,
    )


def _recovery(n: int, *arguments: str) -> Part:
    arguments = ("-n", str(n), *arguments)
    return Part(name="recovery", script="gpu_recovery.py", limit_s=110.0, world_size=n, arguments=arguments)


def parts(gpus: int) -> list[Part]:
    """All that there are, what matters most first. `gpus`: how many this machine has."""
    sharing = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    most = max(2, min(gpus, 8))
    step = Part(name="step", script="gpu_step.py", limit_s=60.0)
    return [
        Part(name="kernels", script="gpu_kernels.py", limit_s=90.0),
        *(_all_reduces(n, "cuda_ipc", 60.0) for n in (2, 4)),
        *(_all_reduces(2, transport, 60.0, name="staged") for transport in ("zmq", "tcp", "shm")),
        step,
        replace(step, ring=_ring_of(1, "auto")),
        _recovery(2),
        _recovery(4),
        _all_reduces(most, "nccl", 60.0, name="nccl", gpus=most),
        _by_torch(most, "nccl", {}, gpus=most),
        _by_torch(2, "nccl-shared", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}),
        *(_by_torch(n, "symmetric", sharing) for n in (2, 4)),
    ]


def rehearsal() -> list[Part]:
    """One of each kind."""
    kept: dict[str, Part] = {}
    for part in sorted(parts(1), key=lambda part: part.gpus):
        kept.setdefault(part.name, part)
    recovery = _recovery(2, "--model", "gpt-mini", "--repeats", "1")
    return [recovery if part.name == "recovery" else part for part in kept.values()]


def run(part: Part, rehearse: bool, left_s: float) -> list[GpuRow]:
    """The rows of a part; if it fails, those that it had before, and one that says so."""
    limit_s = min(part.limit_s, left_s)
    with tempfile.TemporaryDirectory(prefix="ringps-gpu-") as directory:
        out, log = Path(directory) / "rows.json", Path(directory) / "log"
        command = (
            [sys.executable, "-m", "ringps_launcher", "run", *part.ring] if part.ring else [sys.executable]
        )
        command += [str(HERE / part.script), "--json", str(out), *part.arguments]
        why = _carry_out(part, [*command, *(["--rehearse"] if rehearse else [])], log, limit_s)
        rows = gpu_report.read(out) if out.exists() else []
        if why is None and not rows:
            why = "it ended without a result"
        if why is not None:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            outcome: Literal["n/a", "failed"] = "n/a" if part.beside else "failed"
            rows.append(gpu_report.absent(part.title, why, outcome=outcome, world_size=part.world_size))
        return rows


def _carry_out(part: Part, command: Sequence[str], log: Path, limit_s: float) -> str | None:
    """Run a command, with everything it started, to its end or to the limit. Why it failed, if it did."""
    paths = [HERE.parent, HERE.parent / "launcher", HERE, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(one) for one in paths if str(one))
    environ = {**os.environ, "PYTHONPATH": path, **part.environ}
    if limit_s < 5:
        log.touch()
        return "no time was left for it"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"it did not end within {limit_s:.0f} s"
    finally:
        _end(process)
    if code == 0:
        return None
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in said if re.search(r"\w*(Error|Exit)\b.*: |gpu_\w+\.py: ", line)]
    return f"exit code {code}: {(told or said or ['it said nothing'])[-1][:200]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        if process.poll() is not None:
            return
        process.send_signal(number) if number == signal.SIGTERM else os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def measure(
    chosen: Sequence[Part],
    gpus: int,
    rehearse: bool,
    limit_s: float,
    keep: Callable[[list[GpuRow]], object] = bool,
) -> list[GpuRow]:
    """All rows, in order.

    Args:
        chosen: what to run.
        gpus: how many this machine has.
        rehearse: without one.
        limit_s: how long all of it may take.
        keep: called with all rows so far after each part, which the end of this process must not lose.
    """
    end_s = time.monotonic() + limit_s
    rows: list[GpuRow] = []
    for part in chosen:
        if part.gpus > gpus:
            why = f"it needs {part.gpus} GPUs, and here is {gpus}"
            rows.append(gpu_report.absent(part.title, why, outcome="n/a", world_size=part.world_size))
            continue
        begun_s = time.monotonic()
        found = run(part, rehearse, end_s - begun_s)
        rows += found
        keep(rows)
        failed = [one.why for one in found if one.outcome == "failed"]
        said = f"FAILED: {failed[0]}" if failed else "done"
        print(f"gpu: {part.title}: {said} ({time.monotonic() - begun_s:.0f} s)", file=sys.stderr, flush=True)
    return rows


def results_file(directory: Path, facts: Mapping[str, object], today: datetime.date) -> Path:
    """Where the results of this GPU and day go; the directory is made."""
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"gpu-{name}-{today.isoformat()}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="What GPUs can do, and how near ringps comes to it.")
    add = parser.add_argument
    names = dict.fromkeys(part.name for part in parts(1))
    add("--only", type=lambda text: text.split(","), metavar="PART,PART", help=f"of {', '.join(names)}")
    add("--out", type=Path, default=HERE / "results", metavar="DIR", help="where the results go")
    add("--json", type=Path, metavar="FILE", help="write the rows there instead")
    add("--limit-s", type=float, default=480.0, help="how long all of it may take (default: 480)")
    add("--rehearse", action="store_true", help="at tiny sizes, on a pretended GPU; writes no results")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit(f"gpu.py: {_NO_DEVICE}; --rehearse runs everything without")
    gpus = 1 if options.rehearse else torch.cuda.device_count()
    every = rehearsal() if options.rehearse else parts(gpus)
    chosen = [part for part in every if not options.only or part.name in options.only]
    facts = gpu_device.card(options.rehearse).facts()
    common = {**facts, "commit": gpu_device.commit()}
    out = options.json
    if out is None and not options.rehearse:
        out = results_file(options.out, facts, datetime.date.today())

    def complete(rows: list[GpuRow]) -> list[GpuRow]:
        return [replace(one, env={**one.env, **common}) for one in rows]

    def keep(rows: list[GpuRow]) -> None:
        if out is not None:
            gpu_report.write(out, complete(rows))

    rows = measure(chosen, gpus, options.rehearse, options.limit_s, keep)
    keep(rows)
    print(f"{', '.join(f'{name} {value}' for name, value in common.items())}; results: {out}")
    print(gpu_report.table(rows).text(), *gpu_report.missing(rows), sep="\n", flush=True)
    if any(one.outcome == "failed" for one in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
