"""The header in front of every chunk on a data connection.

Little-endian, 48 bytes, followed by the payload (over ZeroMQ, a part of its own):

====== ==== =============================================================
offset type field
====== ==== =============================================================
0      2s   magic, b"rp"
2      u8   protocol version
3      u8   zero
4      u32  generation
8      u64  sequence: which collective of the generation, from 1
16     u64  signature: what the sender called (see `collectives.call`)
24     u32  rank of the sender
28     u32  step of the schedule
32     u32  chunk index in that step
36     u32  payload length in bytes
40     u32  checksum of the payload, or 0 if it is not to be checked
44     u32  CRC-32 of bytes 0 to 43
====== ==== =============================================================
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

from ringps.errors import FrameError

MAGIC = b"rp"
VERSION = 2

_BODY = struct.Struct("<2sBBIQQIIIII")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _BODY.size + _CHECK.size


class ChunkHeader(NamedTuple):
    """Which chunk the payload is."""

    generation: int
    sequence: int
    signature: int
    sender: int
    step: int
    chunk: int
    payload_bytes: int
    payload_check: int = 0
    """See `kernels.digest.checksum`."""


def encode(header: ChunkHeader) -> bytes:
    """The 48 bytes of a header."""
    body = _BODY.pack(MAGIC, VERSION, 0, *header)
    return body + _CHECK.pack(crc32(body))


def decode(frame: bytes) -> ChunkHeader:
    """The header in `frame`.

    Raises:
        FrameError: wrong length, magic, version or checksum.
    """
    if len(frame) != HEADER_BYTES:
        raise FrameError("header length")
    magic, version, zero, *values = _BODY.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError("header magic")
    if _CHECK.unpack_from(frame, _BODY.size)[0] != crc32(frame[: _BODY.size]):
        raise FrameError("header checksum")
    if version != VERSION or zero != 0:
        raise FrameError("protocol version")
    return ChunkHeader(*values)
