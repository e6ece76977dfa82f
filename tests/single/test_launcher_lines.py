from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from ringps_launcher.lines import LineSplitter


def split(chunks: list[bytes], limit_bytes: int = 64) -> list[bytes]:
    splitter = LineSplitter(limit_bytes)
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.finish()


def test_lines_come_out_when_they_are_whole() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"one\ntw") == [b"one"]
    assert splitter.feed(b"o\n\nthree") == [b"two", b""]
    assert splitter.finish() == [b"three"]
    assert splitter.finish() == []


def test_carriage_returns_end_lines_and_leave_no_empty_ones() -> None:
    assert split([b"\r 1%\r 2%\r\r 3%\n"]) == [b" 1%", b" 2%", b" 3%"]
    assert split([b"dos\r\nline\r", b"\n\r\n"]) == [b"dos", b"line", b""]


def test_bytes_that_are_no_utf8_pass_through() -> None:
    assert split([b"\xff\xfe\x00\n\xc3"]) == [b"\xff\xfe\x00", b"\xc3"]


def test_a_line_without_end_is_passed_on_in_pieces() -> None:
    splitter = LineSplitter(8)
    assert splitter.feed(b"12345678") == []
    assert splitter.feed(b"9") == [b"12345678"]
    assert splitter.finish() == [b"9"]


def test_a_piece_does_not_end_inside_a_character() -> None:
    text = "ab€€€€".encode()
    pieces = split([text], limit_bytes=7)
    assert b"".join(pieces) == text
    assert [piece.decode() for piece in pieces] == ["ab€", "€€", "€"]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)), st.integers(4, 40))
def test_how_the_bytes_arrive_does_not_matter(data: bytes, cuts: list[int], limit: int) -> None:
    data = data.replace(b"\x01", b"\r").replace(b"\x02", b"\n")
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[a:b] for a, b in pairwise(edges)]
    lines = split(chunks, limit)
    assert lines == split([data], limit)
    assert all(len(line) <= limit for line in lines)
    assert b"".join(lines) == data.replace(b"\r", b"").replace(b"\n", b"")
