"""The few questions that the launcher asks the network: my address, a free port."""

from __future__ import annotations

import socket

from ringps.errors import SetupError


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` in its parts.

    Raises:
        ValueError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not of the form HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def address_towards(host: str, port: int) -> str:
    """The local IP address from which packets to `host` leave. Sends nothing.

    Raises:
        SetupError: the name is unknown or no route leads there.
    """
    try:
        family, kind, _, _, peer = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(peer)
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise SetupError(f"cannot reach {host}: {error.strerror}; check --join") from error


class ReservedPort:
    """A TCP port that the system gives to nobody else by chance while this is open.

    It is bound but does not listen, with SO_REUSEADDR, so that a server that sets SO_REUSEADDR
    too, as `torch.distributed`'s store does, can listen on it meanwhile.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        self.number: int = self._socket.getsockname()[1]

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
