"""Rules that a field of a control message must pass.

A rule takes a value as msgpack gives it and returns the value of the field, or raises `Invalid`
with a fixed phrase, so that refusals can be counted without storing what a stranger sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Annotated, Any, NamedTuple

MAX_WORKERS = 1024
"""The longest member list for which every message fits into a frame."""
MAX_CALL_BYTES = 240
MAX_REASON_BYTES = 2048
MAX_NAME_BYTES = 128
MAX_COUNT = 2**53

_Z85 = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")
_HEX = frozenset("0123456789abcdef")


class Invalid(Exception):
    """A field breaks its rule; the argument says how, in a fixed phrase that can be counted."""


Rule = Callable[[Any], Any]


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`, both included."""

    def rule(value: Any) -> int:
        if type(value) is not int:  # a bool is an int, but not here
            raise Invalid("not a whole number")
        if not low <= value <= high:
            raise Invalid("out of range")
        return value

    return rule


def flag(value: Any) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise Invalid("not a truth value")
    return value


def text(low_bytes: int, high_bytes: int, *, lines: bool = False) -> Rule:
    """Text that is safe to print: no control characters, except line ends where `lines`."""

    def rule(value: Any) -> str:
        if type(value) is not str:
            raise Invalid("not text")
        try:
            size_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise Invalid("not UTF-8") from None
        if not low_bytes <= size_bytes <= high_bytes:
            raise Invalid("wrong length")
        if not (value.replace("\n", "") if lines else value).isprintable():
            raise Invalid("control character")
        return value

    return rule


def key_half(value: Any) -> str:
    """One half of a CURVE key pair."""
    if type(value) is not str or len(value) != 40 or not _Z85.issuperset(value):
        raise Invalid("not 40 Z85 characters")
    return value


def session(value: Any) -> str:
    """A random 128-bit number in hexadecimal."""
    if type(value) is not str or len(value) != 32 or not _HEX.issuperset(value):
        raise Invalid("not 32 hexadecimal digits")
    return value


def optional(inner: Rule) -> Rule:
    """None, or what `inner` takes."""
    return lambda value: None if value is None else inner(value)


def listing(inner: Rule, low: int = 1, high: int = MAX_WORKERS) -> Rule:
    """`low` to `high` entries that each pass `inner`."""

    def rule(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise Invalid("not a list")
        if not low <= len(value) <= high:
            raise Invalid("wrong length")
        return tuple(map(inner, value))

    return rule


class Seat(NamedTuple):
    """A member of a generation that is being formed; its rank is its position."""

    worker_id: int
    host: str
    pid: int


def seat(value: Any) -> Seat:
    """`[worker id, host, pid]`."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise Invalid("not a seat")
    return Seat(*(rule(part) for rule, part in zip(_SEAT_RULES, value, strict=True)))


def plain(value: Any, depth: int = 3) -> Any:
    """Values that JSON has too, nested at most `depth` deep."""
    if value is None or type(value) is bool:
        return value
    if type(value) is float:
        if not isfinite(value):
            raise Invalid("not finite")
        return value
    if type(value) is int:
        return whole(-MAX_COUNT, MAX_COUNT)(value)
    if type(value) is str:
        return text(0, MAX_REASON_BYTES, lines=True)(value)
    if depth == 0:
        raise Invalid("nested too deep")
    if isinstance(value, (list, tuple)):
        return [plain(entry, depth - 1) for entry in value]
    if isinstance(value, Mapping):
        return {name(key): plain(entry, depth - 1) for key, entry in value.items()}
    raise Invalid("not plain data")


def plain_map(value: Any) -> dict[str, Any]:
    """A map of plain values, as `plain`."""
    if not isinstance(value, Mapping):
        raise Invalid("not a map")
    return {name(key): plain(entry) for key, entry in value.items()}


# The kinds of field that messages have.

name = text(1, MAX_NAME_BYTES)
pid = whole(0, 2**32 - 1)
worker_id = whole(0, MAX_WORKERS - 1)
_SEAT_RULES: tuple[Rule, ...] = (worker_id, name, pid)

WorkerId = Annotated[int, worker_id]
Rank = Annotated[int, worker_id]
WorldSize = Annotated[int, whole(1, MAX_WORKERS)]
Number = Annotated[int, whole(0, MAX_COUNT)]
Pid = Annotated[int, pid]
Port = Annotated[int, whole(1, 65535)]
ExitCode = Annotated[int, whole(0, 255)]
Flag = Annotated[bool, flag]
Name = Annotated[str, name]
Call = Annotated[str, text(0, MAX_CALL_BYTES)]
Reason = Annotated[str, text(0, MAX_REASON_BYTES, lines=True)]
KeyHalf = Annotated[str, key_half]
Session = Annotated[str, session]
