"""`HOST:PORT` and what ZeroMQ and the rules of who may listen make of it."""

from __future__ import annotations

import ipaddress
import socket

from ringps.errors import SetupError


def split(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPv6]:PORT`.

    Raises:
        ValueError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or (":" in bare and bare == host):
        raise ValueError(f"{address!r} is not HOST:PORT")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} does not end in a port from 1 to 65535")
    return bare, int(port)


def join(host: str, port: int | str) -> str:
    """`HOST:PORT`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(host: str) -> str:
    """The IP address to listen on for `host`, which may be a name.

    Raises:
        SetupError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host!r}: {error.strerror}; give an IP address of this machine"
        ) from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # by name, peers find IPv4 addresses only
    return str(found[0][4][0])


def is_loopback(ip: str) -> bool:
    """Whether only processes of this machine can reach an address."""
    return ipaddress.ip_address(ip.partition("%")[0]).is_loopback
