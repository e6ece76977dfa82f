"""PURE: what a checkpoint consists of, as a file that people can read, and the names of directories.

A *checkpoint directory* holds one directory for each checkpoint (an *entry*), those that are being written
(*asides*; in local directories only), and a *claim* for each run, that is for each start of the whole ring::

    step-00000100.7/            step 100, saved by run 7: an entry
        manifest.json           written last; without it the rest is no checkpoint
        model.safetensors ...
    .aside-step-00000100.7.3/   being written by run 7, in its generation 3
    runs/run-0000007.json       the claim of run 7

The last member of a manifest is a hash of all bytes before it, so that damage to the manifest itself is
noticed. It guards against accidents, not against people.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

FORMAT = 1
"""The format of manifests and files that this version writes, and the newest that it reads. Every format is
a JSON object with the member "format" that ends as this one does."""

MANIFEST = "manifest.json"
RUNS = "runs"
KINDS = ("weights", "index", "state", "rank")
"""What a file holds: weights, which weights are in which file, all other state, or what is one rank's own."""

COMPRESSIONS = ("", "zstd")
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_FILE_BYTES = 2**50
MAX_NUMBER = 2**53
"""No step, run or generation is larger: any reader of JSON can tell such numbers apart."""

_HASH_MEMBER = b',\n  "hash": '
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SAVED_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|\+00:00)")
_VERSION = re.compile(r"[ -~]{1,100}")
_ENTRY = re.compile(r"step-(\d{8,16})\.(\d{1,16})")
_ASIDE = re.compile(r"\.aside-step-(\d{8,16})\.(\d{1,16})\.(\d{1,16})")
_CLAIM = re.compile(r"run-(\d{7,16})\.json")


class Entry(NamedTuple):
    """Which checkpoint an entry holds."""

    step: int
    run: int


class Aside(NamedTuple):
    """Who writes which checkpoint."""

    step: int
    run: int
    generation: int


def entry_name(step: int, run: int) -> str:
    """The directory of a checkpoint, in the checkpoint directory."""
    return f"step-{step:08}.{run}"


def parse_entry(name: str) -> Entry | None:
    """What `entry_name` made a name of; None if it made none such."""
    match = _ENTRY.fullmatch(name)
    found = Entry(*map(int, match.groups())) if match else None
    return found if found and entry_name(*found) == name else None


def aside_name(step: int, run: int, generation: int) -> str:
    """The directory in which a checkpoint is written before it is whole."""
    return f".aside-step-{step:08}.{run}.{generation}"


def parse_aside(name: str) -> Aside | None:
    """What `aside_name` made a name of; None if it made none such."""
    match = _ASIDE.fullmatch(name)
    found = Aside(*map(int, match.groups())) if match else None
    return found if found and aside_name(*found) == name else None


def claim_name(run: int) -> str:
    """The claim of a run, in the directory `RUNS`."""
    return f"run-{run:07}.json"


def parse_claim(name: str) -> int | None:
    """The run that `claim_name` made a name of; None if it made none such."""
    match = _CLAIM.fullmatch(name)
    run = int(match.group(1)) if match else None
    return run if run is not None and claim_name(run) == name else None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a checkpoint. All fields speak of the bytes as they are stored.

    Raises:
        ValueError: no file of a checkpoint can have such a name, size, hash or kind.
    """

    name: str
    """Without a directory."""

    size_bytes: int
    digest: str
    """XXH3-128, as 32 hex digits."""

    kind: str
    """One of `KINDS`."""

    def __post_init__(self) -> None:
        if not _matches(_FILE_NAME, self.name) or self.name == MANIFEST:
            raise ValueError(f"{self.name!r} is no name for a file of a checkpoint")
        _check_number(self.name, "size_bytes", self.size_bytes, 0, MAX_FILE_BYTES)
        if not _matches(_DIGEST, self.digest):
            raise ValueError(f"{self.name}: its digest {self.digest!r} is not one of 32 hex digits")
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: its kind {self.kind!r} is not one of {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint: who saved it, when, and which files it consists of.

    Raises:
        ValueError: there can be no such checkpoint; the message says why.
    """

    format: int = FORMAT
    step: int
    """Steps that had been applied."""

    run: int
    generation: int
    world_size: int
    torch: str
    """The version of torch that saved it."""

    ringps: str
    """The version of ringps that saved it."""

    saved_at: str
    """In ISO 8601, UTC, such as "2025-01-31T12:00:00Z"."""

    compression: str
    """One of `COMPRESSIONS`: that of the files of kind "state" and "rank" whose names end in ".zst"."""

    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format!r} cannot be written; this ringps writes {FORMAT}")
        for name, least in (("step", 0), ("run", 1), ("generation", 0), ("world_size", 1)):
            _check_number("manifest", name, getattr(self, name), least, MAX_NUMBER)
        for name in ("torch", "ringps"):
            if not _matches(_VERSION, getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r} is no version")
        if not _matches(_SAVED_AT, self.saved_at):
            raise ValueError(f"saved_at {self.saved_at!r} is no time in UTC")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression {self.compression!r} is unknown here")
        seen: set[str] = set()
        for entry in self.files:
            if entry.name in seen:
                raise ValueError(f"it has two files of the name {entry.name}")
            seen.add(entry.name)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together, without the manifest's own."""
        return sum(entry.size_bytes for entry in self.files)

    def encode(self) -> bytes:
        """As JSON for people, with its hash at the end."""
        members = {**asdict(self), "files": [asdict(entry) for entry in self.files]}
        text = json.dumps(members, indent=2).encode("ascii")
        body = text.removesuffix(b"\n}")
        return body + _HASH_MEMBER + _ending(body)

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        """The manifest that `encode` made `raw` of.

        Raises:
            ValueError: it is none; the message says why.
        """
        if not raw:
            raise ValueError("it is empty")
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it is longer than {MAX_MANIFEST_BYTES} bytes")
        try:
            members = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON: it was cut off, or is damaged") from None
        if type(members) is not dict:
            raise ValueError("it is not a JSON object")
        body, _, ending = raw.rpartition(_HASH_MEMBER)
        if ending != _ending(body):
            raise ValueError("its bytes do not have the hash at its end: it was altered, or is damaged")
        found = members.get("format")
        if type(found) is not int or found < 1:
            raise ValueError(f"it has the format {found!r}, which does not exist")
        if found > FORMAT:
            raise ValueError(f"it has format {found}, written by a newer ringps; this one reads {FORMAT}")
        del members["hash"]
        _check_members("it", members, cls)
        if type(members["files"]) is not list:
            raise ValueError("its files are not a list")
        files = []
        for entry in members["files"]:
            if type(entry) is not dict:
                raise ValueError("one of its files is not an object")
            _check_members("one of its files", entry, FileEntry)
            files.append(FileEntry(**entry))
        return cls(**{**members, "files": tuple(files)})


def _ending(body: bytes) -> bytes:
    return b'"%s"\n}\n' % hashlib.blake2b(body, digest_size=16).hexdigest().encode("ascii")


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return type(value) is str and pattern.fullmatch(value) is not None


def _check_number(where: str, name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{where}: {name} {value!r} is not a whole number from {least} to {most}")


def _check_members(what: str, members: dict[str, Any], of: type) -> None:
    wanted = [field.name for field in fields(of)]
    if missing := [name for name in wanted if name not in members]:
        raise ValueError(f"{what} lacks the member {missing[0]}")
    if unknown := [name for name in members if name not in wanted]:
        raise ValueError(f"{what} has the unknown member {unknown[0]}")
