"""PURE: what a process that fetches training state and one that serves it say to each other.

First each proves to the other that it knows the token, as on data connections (`transport.tcp_handshake`;
the hello differs, so that no proof is worth anything there). Then the fetching side sends requests of
`REQUEST_BYTES`, as many as it likes ahead, and the serving side answers them in order, with bytes whose
number both know: a summary, the skeleton and layout, hashes of pieces, or a piece.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from ringps.errors import FrameError
from ringps.transport.tcp_handshake import (
    CHALLENGE_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    answer,
    challenge,
    proves,
)

__all__ = [
    "CHALLENGE_BYTES", "HELLO_BYTES", "NONCE_BYTES", "PROOF_BYTES", "REQUEST_BYTES", "SUMMARY_BYTES",
    "Greeting", "Kind", "Request", "Summary", "answer", "challenge", "check_hello", "decode_request",
    "decode_summary", "encode_request", "encode_summary", "hello", "proves",
]  # fmt: skip

MAGIC = b"rps1"
HELLO_BYTES = len(MAGIC) + NONCE_BYTES
_REQUEST = struct.Struct("<BQQ")
REQUEST_BYTES = _REQUEST.size
_SUMMARY = struct.Struct("<QQQ16s")
SUMMARY_BYTES = _SUMMARY.size


class Greeting(IntEnum):
    """The serving side's last byte of the handshake."""

    WELCOME = 1
    NOTHING_OFFERED = 2
    FULL = 3


class Kind(IntEnum):
    """What a request asks for."""

    SUMMARY = 1
    """A `Summary`."""

    SKELETON = 2
    """The skeleton, then the layout."""

    HASHES = 3
    """The hashes of pieces `first`, `first + stride`, ..."""

    PIECE = 4
    """The bytes of piece `first`."""


class Request(NamedTuple):
    """What the fetching side asks for."""

    kind: Kind
    first: int = 0
    stride: int = 1


class Summary(NamedTuple):
    """What must be equal on all servers."""

    step: int
    skeleton_bytes: int
    layout_bytes: int
    digest: bytes
    """Hash of skeleton and layout."""


def hello(nonce: bytes) -> bytes:
    """The first bytes on a connection, of the fetching side."""
    return MAGIC + nonce


def check_hello(raw: bytes) -> None:
    """
    Raises:
        FrameError: `raw`, which is `HELLO_BYTES` long, is no hello.
    """
    if not raw.startswith(MAGIC):
        raise FrameError("connection that does not say hello")


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    return _REQUEST.pack(*request)


def decode_request(raw: bytes, piece_count: int) -> Request:
    """The request in `raw`, which is `REQUEST_BYTES` long.

    Raises:
        FrameError: it is none, or asks for what there is not.
    """
    number, first, stride = _REQUEST.unpack(raw)
    try:
        kind = Kind(number)
    except ValueError:
        raise FrameError("unknown request") from None
    if kind is Kind.PIECE and first >= piece_count:
        raise FrameError("request for a piece that does not exist")
    if stride < 1:
        raise FrameError("request with stride 0")
    return Request(kind, first, stride)


def encode_summary(summary: Summary) -> bytes:
    """The bytes of a summary."""
    return _SUMMARY.pack(*summary)


def decode_summary(raw: bytes) -> Summary:
    """The summary in `raw`, which is `SUMMARY_BYTES` long; its numbers are still to be checked."""
    return Summary(*_SUMMARY.unpack(raw))
