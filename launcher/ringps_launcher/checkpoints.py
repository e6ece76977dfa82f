"""`ringps checkpoints`: what is in a checkpoint directory, as tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ringps.checkpoint import inspection
from ringps.checkpoint.inspection import Listed, Listing

_DAMAGED = 1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def ls(where: str, *, as_json: bool) -> int:
    """Print what checkpoints there are; the exit code."""
    listing = inspection.ls(where)
    if as_json:
        _print_json(listing)
        return 0
    _print_table(
        ("STEP", "RUN", "SAVED (UTC)", "RANKS", "FILES", "SIZE", "STATUS"),
        [(*_columns(listed), _status(listed, listing.restored)) for listed in listing.checkpoints],
        left=("SAVED (UTC)", "STATUS"),
    )
    _print_leftovers(listing)
    return 0


def verify(where: str, step: int | None, *, as_json: bool) -> int:
    """Read all files, and print what is damaged; the exit code, 1 if anything is."""
    listing = inspection.verify(where, step)
    if as_json:
        _print_json(listing)
        return _DAMAGED if listing.damage else 0
    for damage in listing.damage:
        print(f"damaged: {damage.checkpoint}: {damage.file}: {_printable(damage.reason)}")
    for listed in listing.checkpoints:
        for name in listed.extra_files:
            print(f"note: {listed.name}: {_printable(name)} is not in its manifest")
    _print_leftovers(listing)
    count = len(listing.checkpoints)
    damaged = sum(bool(listed.damage) for listed in listing.checkpoints)
    whole = sum(_size_bytes(listed) for listed in listing.checkpoints if not listed.damage)
    print(f"{count - damaged} of {count} checkpoints are whole ({_amount(whole)})")
    if step is None:
        restored = listing.restored
        print(f"a restore takes {restored.name}" if restored else "a restore finds no checkpoint to take")
    return _DAMAGED if damaged else 0


def export(where: str, out: str, step: int | None, format: str, *, force: bool) -> int:
    """Write a checkpoint in another format; the exit code."""
    exported = inspection.export(where, out, step=step, format=format, force=force)
    for line in exported.passed_over:
        print(f"ringps: {_printable(line)}", file=sys.stderr)
    found = exported.checkpoint
    print(f"step {found.step} of run {found.run} is exported to {out}")
    return 0


def _columns(listed: Listed) -> tuple[str, ...]:
    manifest = listed.manifest
    if manifest is None:
        return str(listed.step), str(listed.run), "?", "?", "?", "?"
    return (
        str(listed.step),
        str(listed.run),
        manifest.saved_at[:19].replace("T", " "),
        str(manifest.world_size),
        str(len(manifest.files)),
        _amount(manifest.size_bytes),
    )


def _status(listed: Listed, restored: Listed | None) -> str:
    if listed is restored:
        return "whole; a restore takes this one"
    status = "whole"
    if listed.damage:
        first, more = listed.damage[0], len(listed.damage) - 1
        status = f"damaged: {first.file}: {_printable(first.reason)}" + (
            f" (and {more} more)" if more else ""
        )
    return f"{status}; not in the history: {listed.left_out}" if listed.left_out else status


def _size_bytes(listed: Listed) -> int:
    return listed.manifest.size_bytes if listed.manifest else 0


def _amount(size_bytes: int) -> str:
    amount, unit = float(size_bytes), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{size_bytes} B"


def _printable(text: str) -> str:
    """A text that others may have had a hand in, in one line and without control characters."""
    return text if text.isprintable() else ascii(text)


def _print_leftovers(listing: Listing) -> None:
    for leftover in listing.leftovers:
        print(f"no checkpoint: {leftover.name}: {leftover.reason}")


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> None:
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        cells = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        )
        print("  ".join(cells).rstrip())


def _print_json(listing: Listing) -> None:
    restored = listing.restored
    document = {
        "where": listing.where,
        "restored": restored and restored.name,
        "checkpoints": [_members(listed) for listed in listing.checkpoints],
        "leftovers": [leftover._asdict() for leftover in listing.leftovers],
    }
    print(json.dumps(document, indent=2))


def _members(listed: Listed) -> dict[str, Any]:
    manifest = listed.manifest
    return {
        "name": listed.name,
        "step": listed.step,
        "run": listed.run,
        "generation": manifest and manifest.generation,
        "world_size": manifest and manifest.world_size,
        "saved_at": manifest and manifest.saved_at,
        "size_bytes": manifest and manifest.size_bytes,
        "files": manifest and len(manifest.files),
        "torch": manifest and manifest.torch,
        "ringps": manifest and manifest.ringps,
        "whole": not listed.damage,
        "damage": [{"file": damage.file, "reason": damage.reason} for damage in listed.damage],
        "left_out": listed.left_out,
        "extra_files": list(listed.extra_files),
    }
