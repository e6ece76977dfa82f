"""PURE: the names of a cluster and the packets in which they are asked for (RFC 1035; A records only)."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]
Zone = dict[str, list[str]]
"""Names in lower case, without the last dot, to IPv4 addresses."""

DOMAIN = "cluster.local"
_A, _ANY, _IN = 1, 255, 1
_TTL_S = 5
_MOST = 28
"""Addresses in an answer: more would not fit into a packet of 512 bytes."""
_REFUSED, _NXDOMAIN, _FORMAT_ERROR = 5, 3, 1


def zone(services: Iterable[Object], slices: Iterable[Object]) -> Zone:
    """All names that exist.

    A headless Service stands for its endpoints that are ready (the controller calls all ready where
    `publishNotReadyAddresses` is set); those with a host name have a name of their own.
    """
    found: Zone = {}
    headless = set()
    for service in services:
        about, spec = service["metadata"], service["spec"]
        name = f"{about['name']}.{about['namespace']}.svc.{DOMAIN}"
        if spec.get("clusterIP") == "None":
            headless.add((about["namespace"], about["name"]))
        elif spec.get("clusterIP"):
            found[name] = [spec["clusterIP"]]
    for each in slices:
        about = each["metadata"]
        service_name = (about.get("labels") or {}).get("kubernetes.io/service-name", "")
        if (about["namespace"], service_name) not in headless or each.get("addressType") != "IPv4":
            continue
        name = f"{service_name}.{about['namespace']}.svc.{DOMAIN}"
        for endpoint in each.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            names = [name]
            if endpoint.get("hostname"):
                names.append(f"{endpoint['hostname']}.{name}")
            for each_name in names:
                known = found.setdefault(each_name, [])
                known.extend(a for a in endpoint["addresses"] if a not in known)
    return found


def answer(packet: bytes, names: Mapping[str, list[str]]) -> bytes | None:
    """The response to a query; None to what is none."""
    if len(packet) < 12:
        return None
    number, flags, questions = struct.unpack_from(">HHH", packet)
    if flags & 0x8000:
        return None
    try:
        if questions != 1:
            raise ValueError("one question at a time")
        name, end = _name(packet, 12)
        kind, family = struct.unpack_from(">HH", packet, end)
    except (ValueError, IndexError, struct.error):
        return struct.pack(">HHHHHH", number, 0x8000 | _FORMAT_ERROR, 0, 0, 0, 0)
    question = packet[12 : end + 4]
    code, addresses = 0, []
    if family != _IN or not (name == DOMAIN or name.endswith("." + DOMAIN)):
        code = _NXDOMAIN if family == _IN else _REFUSED
    elif name not in names:
        code = _NXDOMAIN
    elif kind in (_A, _ANY):
        addresses = names[name][:_MOST]
    recursion = flags & 0x0100
    header = struct.pack(">HHHHHH", number, 0x8480 | recursion | code, 1, len(addresses), 0, 0)
    records = b"".join(
        struct.pack(">HHHIH", 0xC00C, _A, _IN, _TTL_S, 4) + ipaddress.IPv4Address(address).packed
        for address in addresses
    )
    return header + question + records


def _name(packet: bytes, position: int) -> tuple[str, int]:
    labels = []
    while (length := packet[position]) != 0:
        if length > 63:
            raise ValueError("a question has no pointers")
        labels.append(packet[position + 1 : position + 1 + length].decode("ascii").lower())
        position += 1 + length
    return ".".join(labels), position + 1
