"""From a checkpoint directory to a file or directory that needs no ringps: which one, and where to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ringps.checkpoint.directory import Contents, Directory, Found
from ringps.errors import CheckpointError

_DCP_METADATA = ".metadata"
"""In every directory of torch.distributed.checkpoint."""


class Exported(NamedTuple):
    """What was exported."""

    checkpoint: Found
    passed_over: list[str]
    """Newer checkpoints that are damaged, and what is wrong with each."""


class Target:
    """A path at which a file or directory is to appear, whole."""

    def __init__(self, out: str | os.PathLike[str], *, force: bool) -> None:
        """
        Args:
            out: where.
            force: replace what is there: a file, or a directory that was exported.

        Raises:
            FileExistsError: there is something at `out`, which is not to be replaced.
            FileNotFoundError: there is no directory above it.
        """
        self._out = Path(os.path.abspath(out))
        self._part = self._out.with_name(f".{self._out.name}.part")
        self._old = self._out.with_name(f".{self._out.name}.old")
        if not self._out.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {self._out.parent}")
        if not os.path.lexists(self._out):
            return
        if not force:
            raise FileExistsError(f"{self._out} exists already; --force replaces it")
        if self._out.is_dir() and not (self._out / _DCP_METADATA).exists():
            raise FileExistsError(f"{self._out} is a directory that was not exported; it is not replaced")

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A path that does not exist. What is there at the end of the context, if that ends well, appears at
        the target; otherwise what was there stays."""
        _remove(self._part)
        try:
            yield self._part
            if self._out.is_dir() or (self._part.is_dir() and os.path.lexists(self._out)):
                _remove(self._old)
                os.rename(self._out, self._old)
            os.rename(self._part, self._out)
        except BaseException:
            _remove(self._part)
            raise
        _remove(self._old)


def export_to(target: Target, format: str, directory: Directory, step: int | None) -> Exported:
    """Write a checkpoint to a target; see `inspection.export`."""
    contents = directory.contents()
    lineage = directory.lineage(contents)
    # Who wants one of a past that was given up must say so.
    points = lineage.history if step is None else [*lineage.history, *lineage.left_out]
    candidates = [Found(point.step, point.run) for point in points if step is None or point.step == step]
    if not candidates:
        raise CheckpointError(none_in(directory.where, contents, step))
    from ringps.checkpoint.portable import portable, read_state, write  # loads torch

    damaged: list[str] = []
    for found in candidates:
        try:
            state = read_state(directory, found.name)
        except CheckpointError as error:
            damaged.append(f"{found.name} is damaged: {error}")
            continue
        with target.writing() as path:
            write(portable(state, directory.path_of(found.name)), path, format)
        return Exported(found, damaged)
    raise CheckpointError(f"there is no whole checkpoint in {directory.where}: {'; '.join(damaged)}")


def none_in(where: str, contents: Contents, step: int | None) -> str:
    """What to say where no checkpoint is (of a step)."""
    if contents.checkpoints:
        newest = max(found.step for found in contents.checkpoints)
        if step is None:
            return f"none of the checkpoints in {where} belongs to the history; --step {newest} names one"
        return f"there is no checkpoint of step {step} in {where}; the newest is of step {newest}"
    unfinished = len(contents.asides) + len(contents.torn)
    return f"there is no checkpoint in {where}" + (f", but {unfinished} unfinished" if unfinished else "")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
