"""PURE: how the two ends of a TCP connection prove to each other that they know the generation's token.

Challenge and response with keyed BLAKE2b (RFC 7693), four messages of fixed size:

====================== ===================================================================
connecting -> accepting hello: what the connection is for, and a nonce
accepting -> connecting challenge: a nonce, and the proof of the accepting side
connecting -> accepting proof: that of the connecting side
accepting -> connecting one byte: welcome
====================== ===================================================================

A proof covers which side gives it, the hello and both nonces, so none can be replayed, reflected, or
used for another generation, other ranks or another connection. The token itself never travels.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import blake2b
from typing import NamedTuple

from ringps.errors import FrameError

MAGIC = b"rp1\n"
NONCE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct("<4sIIIBBH16s")
HELLO_BYTES = _HELLO.size
CHALLENGE_BYTES = NONCE_BYTES + _PROOF_BYTES
PROOF_BYTES = _PROOF_BYTES
WELCOME = b"\x01"

_ACCEPTING, _CONNECTING = b"accepting", b"connecting"


class Hello(NamedTuple):
    """What a connection is for."""

    generation: int
    sender: int
    """Rank that connects."""

    receiver: int
    """Rank that is connected to."""

    probe: bool
    """It only measures the link; what comes on it is dropped."""

    position: int
    """Which of the link's sockets it is."""

    total: int
    """How many sockets the link has."""

    nonce: bytes


def encode_hello(hello: Hello) -> bytes:
    """The bytes of a hello."""
    return _HELLO.pack(MAGIC, *hello)


def decode_hello(raw: bytes) -> Hello:
    """The hello in `raw`, which is `HELLO_BYTES` long.

    Raises:
        FrameError: it is none.
    """
    magic, generation, sender, receiver, probe, position, total, nonce = _HELLO.unpack(raw)
    if magic != MAGIC or probe > 1 or position >= total:
        raise FrameError("connection that does not say hello")
    return Hello(generation, sender, receiver, bool(probe), position, total, nonce)


def challenge(secret: bytes, hello: bytes, nonce: bytes) -> bytes:
    """The accepting side's answer to a hello."""
    return nonce + _prove(secret, _ACCEPTING, hello, nonce)


def answer(secret: bytes, hello: bytes, challenge: bytes) -> bytes:
    """The connecting side's proof.

    Raises:
        FrameError: the accepting side does not know the token.
    """
    nonce, theirs = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
    if not hmac.compare_digest(theirs, _prove(secret, _ACCEPTING, hello, nonce)):
        raise FrameError("it does not know this generation's token")
    return _prove(secret, _CONNECTING, hello, nonce)


def proves(secret: bytes, hello: bytes, nonce: bytes, proof: bytes) -> bool:
    """Whether the connecting side knows the token."""
    return hmac.compare_digest(proof, _prove(secret, _CONNECTING, hello, nonce))


def _prove(secret: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    return blake2b(hello + nonce, digest_size=_PROOF_BYTES, key=secret, person=side).digest()
