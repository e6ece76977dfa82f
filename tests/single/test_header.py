"""The header of a chunk: round trip, recorded bytes, and every way to be malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.errors import FrameError
from ringps.wire.header import HEADER_BYTES, ChunkHeader, decode, encode

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
headers = st.builds(ChunkHeader, u32, u64, u64, u32, u32, u32, u32, u32)


@given(headers)
def test_round_trip(header: ChunkHeader) -> None:
    frame = encode(header)
    assert len(frame) == HEADER_BYTES
    assert decode(frame) == header


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(header: ChunkHeader, bit: int) -> None:
    frame = bytearray(encode(header))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        decode(bytes(frame))


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_arbitrary_bytes_are_refused_with_a_reason(frame: bytes) -> None:
    with pytest.raises(FrameError) as caught:
        decode(frame)
    assert caught.value.reason in {"header length", "header magic", "header checksum"}


@given(headers, st.integers(0, HEADER_BYTES - 1))
def test_truncated_is_refused(header: ChunkHeader, length: int) -> None:
    with pytest.raises(FrameError, match="header length"):
        decode(encode(header)[:length])


def test_bytes_are_as_recorded(golden: object) -> None:
    samples = [
        ChunkHeader(1, 1, 0, 0, 0, 0, 0),
        ChunkHeader(2, 7, 0x0123456789ABCDEF, 3, 4, 5, 1 << 20, 0x89ABCDEF),
        ChunkHeader(2**32 - 1, 2**64 - 1, 2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    ]
    lines = [f"{header}\n  {encode(header).hex(' ', 4)}" for header in samples]
    golden("chunk_headers.txt", "\n".join(lines) + "\n")  # type: ignore[operator]
