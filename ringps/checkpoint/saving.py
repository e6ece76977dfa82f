"""What a save is told, and what it tells: settings, where a rank stands, events and counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ringps.checkpoint import files


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How checkpoints are saved."""

    compression: Literal["", "zstd"] = ""
    """Of all but the weights, which stay readable for every tool. zstd takes the package zstandard
    (`ringps[zstd]`) and about a second of a core for 400 MB; floating-point numbers shrink by a tenth."""

    max_failed: int = 10
    """How many saves in a row may fail, counted for each directory, before training stops with an error."""

    final: bool = True
    """Save the last step of `steps` too, if none was due then."""

    stop_window_s: float = 2.0
    """After SIGTERM to this worker: how long to wait whether all others get it too, which stops the job with
    a checkpoint. Else this worker leaves, and the others go on."""

    def __post_init__(self) -> None:
        files.check_compression(self.compression)
        if self.max_failed < 0:
            raise ValueError(f"max_failed must be 0 or more, not {self.max_failed}")
        if not self.stop_window_s >= 0:
            raise ValueError(f"stop_window_s must be 0 or more, not {self.stop_window_s}")


class Place(NamedTuple):
    """Where in the ring this rank is."""

    rank: int
    world_size: int
    generation: int


class Happening(NamedTuple):
    """Something to be told; the same on all ranks."""

    event: str
    """"checkpoint_saved", "checkpoint_failed" or "checkpoint_late"."""
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SaverStatistics:
    """What this rank has done for checkpoints."""

    saved: int
    """Checkpoints that became whole in the first directory."""
    failed: int
    """Saves that did not come to a good end, of both directories."""
    dropped: int
    """Saves that were given up because the ring changed."""
    stall_s: tuple[float, ...]
    """How long each snapshot held up training, the newest 100."""
    bytes_written: int
    """By this rank, of snapshots."""
