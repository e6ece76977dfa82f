"""How much memory does training take beyond plain PyTorch, in multiples of the gradients' size?

Each variant trains in processes of its own, with one copy of the model. A page that several processes
share counts once in their sum.

    ringps run -n 2 benchmarks/memory.py --variant none --model mlp --directory D    # what `extra` starts
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed

import report
import ringps
import variants
from models import WORKLOADS
from ringps import worker_env

_ROLLUP = Path("/proc/self/smaps_rollup")
_KINDS = ("Pss_Anon", "Pss_Shmem")  # not files: which pages of a library are there depends on others
_INTERVAL_S = 0.005
_STEPS = 4


def proportional_bytes() -> int:
    """This process's own memory, and its part of the shared memory that it has mapped (PSS).

    A page that k processes have mapped counts 1/k in each. Mapped files, such as libraries, are left out.
    Source: proc_pid_smaps(5).

    Raises:
        OSError: the kernel does not tell.
    """
    kib = {}
    for line in _ROLLUP.read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    if not kib.keys() >= set(_KINDS):
        raise OSError(f"{_ROLLUP} lacks {' or '.join(_KINDS)}; Linux 5.4 and later have them")
    return 1024 * sum(kib[name] for name in _KINDS)


class Peak:
    """The most `proportional_bytes` while a `with` block runs, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def sample(self) -> None:
        """Look now."""
        self.bytes = max(self.bytes, proportional_bytes())

    def __enter__(self) -> Peak:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self.sample()


def mean_peak_bytes(variant: str, model: str, world_size: int, transport: str) -> float:
    """The peak while `variant` trains, as the mean of the workers.

    Raises:
        SystemExit: a worker failed; with its exit code.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "ringps_launcher", "run", "-n", str(world_size)]
        command += ["--transport", transport, __file__, "--variant", variant, "--model", model]
        code = subprocess.run([*command, "--directory", directory], check=False).returncode
        if code:
            sys.exit(code)
        peaks = [int(path.read_text()) for path in Path(directory).iterdir()]
    assert len(peaks) == world_size
    return statistics.mean(peaks)


def main() -> None:
    """Train one variant, as one of the workers."""
    parser = argparse.ArgumentParser(description="Peak memory of a worker in training.")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--model", choices=WORKLOADS, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="for a file per worker")
    options = parser.parse_args()
    env = worker_env.read()
    if env is None:
        parser.error("start it with `ringps run`")
    torch.set_num_threads(1)
    over_gloo = options.variant in variants.DDPS
    over_ringps = options.variant != report.WITHOUT and not over_gloo
    if over_ringps:
        ringps.init()
    if over_gloo:
        torch.distributed.init_process_group("gloo")
    workload = WORKLOADS[options.model]
    variant = variants.make(options.variant, workload, workload.build())
    batches = variants.batches(workload, env.worker_id)
    with Peak() as peak:
        # Gradients and buckets are all there at the end of backward.
        hook = variant.optimizer.register_step_pre_hook(lambda *_: peak.sample())
        for step in range(_STEPS):
            variant.step(batches[step % len(batches)])
        hook.remove()
    (options.directory / f"{env.worker_id}").write_text(str(peak.bytes))
    if over_gloo:
        torch.distributed.destroy_process_group()
    if over_ringps:
        ringps.shutdown()


if __name__ == "__main__":
    main()
