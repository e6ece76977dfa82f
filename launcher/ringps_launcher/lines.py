"""PURE: a byte stream cut into whole lines, with bounded memory."""

from __future__ import annotations

import re

LIMIT_BYTES = 64 * 1024
"""A longer line is passed on in pieces of this size."""

_LINE_END = re.compile(rb"\r\n|\n|\r")


class LineSplitter:
    """Cuts one worker's output into lines.

    A carriage return ends a line too, so that progress bars show; lines that it leaves empty are
    dropped. Bytes are not decoded: whatever encoding a worker writes comes out as it went in.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._rest = b""
        self._swallow_newline = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take more bytes in; the lines that they complete, without their ends."""
        if not data:
            return []
        if self._swallow_newline:
            data = data.removeprefix(b"\n")
        text = self._rest + data
        lines: list[bytes] = []
        start = 0
        self._swallow_newline = False
        # Only `data` can hold a line end: without this, a long line would be searched repeatedly.
        for end in _LINE_END.finditer(text, len(self._rest)):
            line = text[start : end.start()]
            start = end.end()
            if line or end.group() != b"\r":
                lines.extend(self._pieces(line))
            # The rest of a \r\n may come with the next bytes.
            self._swallow_newline = bool(line) and end.group() == b"\r" and start == len(text)
        *full, self._rest = self._pieces(text[start:])
        return lines + full

    def finish(self) -> list[bytes]:
        """The stream ended: what is left of its last line, if anything."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []

    def _pieces(self, line: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        while len(line) > self._limit_bytes:
            cut = self._limit_bytes
            while cut > max(1, self._limit_bytes - 3) and line[cut] & 0xC0 == 0x80:
                cut -= 1  # do not cut a UTF-8 character in two
            pieces.append(line[:cut])
            line = line[cut:]
        return [*pieces, line]
