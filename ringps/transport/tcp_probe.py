"""How many TCP connections does a link need? Clouds limit the rate of each; elsewhere a single one is best.

The sending end opens as many as it may use, keeps 1, 2, 4 and 8 of them busy for a few milliseconds each,
and counts the bytes that the other end acknowledged (`tcpi_bytes_acked`, Linux 4.1).
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Mapping, Sequence

COUNTS = (1, 2, 4, 8)
_WARM_S = 0.005
"""Of each stage: its sockets fill the link, and nothing is counted."""
_COUNTED_S = 0.009
_BLOCK = memoryview(bytes(1 << 18))
_BYTES_ACKED = struct.Struct("120xQ")
_STAGES = (*COUNTS, 1)
"""One connection is measured again at the end: at the beginning it has yet to find the link's rate."""
_GAIN = 1.2


def least_sufficient(rates: Mapping[int, float]) -> tuple[int, str]:
    """The number of sockets to use, and why: more only if they are a fifth faster than fewer.

    A limit on each connection shows by far more than that. Where the link itself is the limit, several only
    compete with each other, and what looks like a gain is noise.

    Args:
        rates: bytes per second by number of sockets.
    """
    if max(rates.values()) <= 0:
        return 1, "nothing came through while it was measured"
    count = 1
    for number in sorted(rates):
        if rates[number] >= _GAIN * rates[count]:
            count = number
    measured = ", ".join(f"{number}: {rate * 8e-9:.3g}" for number, rate in sorted(rates.items()))
    return count, f"measured in Gbit/s by number of sockets: {measured}"


class Probe:
    """A measurement under way; whoever polls its sockets drives it."""

    def __init__(self, sockets: Sequence[socket.socket], now_s: float) -> None:
        self._sockets = sockets
        self._stage = 0
        self._rates: dict[int, float] = {}
        self._counting = False
        self._started_s = now_s
        self._acked = 0
        self.deadline_s = now_s + _WARM_S
        """When to call `go_on` at the latest."""

    def interest(self, index: int) -> int:
        """What to poll socket `index` for."""
        return select.POLLOUT if index < _STAGES[self._stage] else 0

    def push(self, index: int) -> None:
        """Socket `index` has room."""
        try:
            self._sockets[index].send(_BLOCK)
        except OSError:
            pass  # a link that is broken says so when it is used

    def go_on(self, now_s: float) -> tuple[int, str] | None:
        """Number of sockets and the reason, when the measurement is over."""
        if now_s < self.deadline_s:
            return None
        count = _STAGES[self._stage]
        acked = sum(_bytes_acked(one) for one in self._sockets[:count])
        if not self._counting:
            self._counting, self._started_s, self._acked = True, now_s, acked
            self.deadline_s = now_s + _COUNTED_S
            return None
        rate = (acked - self._acked) / (now_s - self._started_s)
        self._rates[count] = max(rate, self._rates.get(count, 0.0))
        if self._stage + 1 == len(_STAGES):
            return least_sufficient(self._rates)
        self._stage += 1
        self._counting = False
        self.deadline_s = now_s + _WARM_S
        return None


def drop(connection: socket.socket) -> None:
    """Close a connection and forget what it has not sent yet."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _bytes_acked(connection: socket.socket) -> int:
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(info)[0])
    except (OSError, struct.error):
        return 0
