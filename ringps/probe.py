"""Named moments in the life of a worker. `ringps.testing` listens to them; otherwise nobody does.

========================= ========================================================================
point                     what is passed
========================= ========================================================================
``step``                  a reduction of all buckets begins, or is done again: `step`, `attempt`,
                          `parameters` (those that are trained)
``bucket``                a bucket is handed to the ring: `step`, `bucket`, `attempt`
``reduced``               a bucket's result is there, before it is hashed: `step`, `bucket`,
                          `tensor` (flat, writable), `attempt`
``chunk``                 a frame is about to be sent over TCP: `header`, `payload`, `peer` (its rank), and
                          the sockets to and from it, `outgoing` and `incoming`
``phase``                 shared memory: a part of a collective is about to be posted: `connections`
``vote``                  before this rank's vote is cast: `step`, `attempt`
``voted``                 all votes are here and agree; nothing is committed yet: `step`
``committed``             this rank has committed: `step`, `account` (who trained what: by rank of the
                          last vote, for each batch its `data.ledger.Row` and the number of samples)
``prepare``               told of a new generation, before it listens: `generation`
``bound``                 listens, and has said so: `generation`
``connected``             is connected to the members of the new generation: `generation`
``handshake``             before this rank says how far it is: `generation`
``boundary``              between two steps, before anything else happens there: `step`
``offer``                 pauses, and serves its state to a joining worker: `step`
``fetch``                 a joining worker is about to fetch a piece of the state: `step`, `piece`
``fed``                   a joining worker holds the state, before it says so: `step`
``save_write``            the next block of a checkpoint's file is about to be written: `path` (in the
                          checkpoint directory), `written` (bytes of the file so far)
``save_publish``          a checkpoint is made visible: `path`, `stage` (``"manifest"``: it is about to be
                          written; ``"rename"``: it is, and lies in the aside; ``"done"``)
``saved``                 this rank knows that a checkpoint is whole: `saved` (its step), `lane` (0: in the
                          first directory, 1: in the durable one)
``restore``               a checkpoint is about to be tried: `entry` (its name)
========================= ========================================================================

Whoever listens may change what is passed, block, or end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

listener: Callable[[str, dict[str, Any]], None] | None = None
"""Set by `ringps.testing`. Where a point lies on a hot path, look before you call `reached`."""


def reached(point: str, **passed: Any) -> dict[str, Any]:
    """This process is at that point. Returns what was passed, as whoever listens has left it."""
    if listener is not None:
        listener(point, passed)
    return passed
