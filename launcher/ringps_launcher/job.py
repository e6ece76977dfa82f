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

    transport: Literal["auto", "shm", "tcp", "zmq"] = "auto"
    """How the workers' data travels."""

    encrypt_data: bool = False
    """Encrypt data connections too, not only control connections."""

    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"-n must be at least 1, not {self.workers}")
        if not self.grace_s >= 0:
            raise ValueError(f"--grace must be 0 or more seconds, not {self.grace_s}")
        if not self.program:
            raise ValueError("name a script to run")

    def command(self, python: str) -> tuple[str, ...]:
        """The argument vector of every worker."""
        flag = ("-m",) if self.is_module else ()
        return (python, *flag, self.program, *self.arguments)
