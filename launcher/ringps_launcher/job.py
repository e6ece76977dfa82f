"""PURE: what is to be run on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Job:
    """The workers of one launcher, all running the same program."""

    program: str
    """Path of a Python script, or a module's dotted name when `is_module`."""

    arguments: tuple[str, ...] = ()
    """Handed to the program unchanged."""

    is_module: bool = False
    """Run the program as `python -m` does."""

    workers: int
    """How many to start on this machine."""

    transport: Literal["auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc"] = "auto"
    """How the workers' data travels."""

    encrypt_data: bool = False
    """Encrypt data connections too, not only control connections."""

    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""

    min_workers: int = 1
    """With how many workers the ring still goes on. Counts where this launcher is the whole job; of a job
    on several machines, the coordinator is told."""

    max_restarts: int = 3
    """Lost workers that this launcher replaces, all in all. Where it is the whole job, starting the whole
    ring again counts as one."""

    checkpoint_dir: str | None = None
    """Where `ringps.Checkpointer` saves unless the script names a directory: an absolute path or a URL."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"-n must be at least 1, not {self.workers}")
        if not 1 <= self.min_workers <= self.workers:
            raise ValueError(
                f"--min-workers must be from 1 to the {self.workers} of -n, not {self.min_workers}"
            )
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts must be 0 or more, not {self.max_restarts}")
        if not self.grace_s >= 0:
            raise ValueError(f"--grace must be 0 or more seconds, not {self.grace_s}")
        if not self.program:
            raise ValueError("name a script to run")

    def command(self, python: str) -> tuple[str, ...]:
        """The argument vector of every worker."""
        flag = ("-m",) if self.is_module else ()
        return (python, *flag, self.program, *self.arguments)
