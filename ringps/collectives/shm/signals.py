"""Telling the other processes of a host that something is ready, and waiting for them.

Ranks go through the same phases in the same order. At the end of a phase a rank posts: it adds one to an
eventfd of every peer. A wait takes one from each of its own. So nobody needs an atomic instruction,
a count is never lost, and a waiting process sleeps in poll(2).

*Why what a peer wrote before its post is seen after the wait*, on every architecture: write(2) on an
eventfd changes its counter under the spin lock of its wait queue, and read(2) takes it under the same lock.
The unlock is a store-release that orders all that the poster stored before, also in user space; the lock
is a load-acquire that orders all that the reader loads after. The phase word that a rank keeps in its
header is a hint only: it lets a peer look before it sleeps, and nothing is concluded from it.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ringps import probe
from ringps.collectives.shm.memory import Segment

_SPIN_S = 100e-6
"""How long a wait looks, and yields its core, before it sleeps. Waking a sleeper takes about as long."""


@dataclass(eq=False)
class Peer:
    """Another process of this host, and what joins it to this one."""

    local: int
    """Its position among the group's members."""

    rank: int
    """Its rank in the ring."""

    segment: Segment
    connection: socket.socket
    """Closes when the process ends."""

    incoming: int
    """eventfd that it posts to."""

    outgoing: int
    """eventfd that we post to."""

    posts: int = 0
    """Taken from `incoming` and not used up by a wait yet."""

    words: memoryview = field(init=False)
    """Its header."""

    poller: select.poll = field(init=False)
    """What may end a wait for this peer."""

    def __post_init__(self) -> None:
        self.words = memoryview(self.segment.memory).cast("Q")
        self.poller = select.poll()

    def close(self) -> None:
        """Close all that is not memory."""
        self.connection.close()
        os.close(self.incoming)
        os.close(self.outgoing)
        self.segment.close()


class Signals:
    """This process's posts and waits. Used by one thread at a time, but for `wake`."""

    def __init__(self, words: memoryview, peers: Sequence[Peer]) -> None:
        """
        Args:
            words: this rank's header, whose first word is its phase.
            peers: the other members.
        """
        self._words = words
        self._peers = peers
        self._phase = 0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._owners = {peer.connection.fileno(): peer for peer in peers}
        self.gone: list[Peer] = []
        """Peers whose process has closed the connection; what they posted before still counts."""
        for peer in peers:
            for descriptor in (self._wake_fd, peer.incoming, *self._owners):
                peer.poller.register(descriptor, select.POLLIN)
        self.attend: Callable[[Peer, float], float] = lambda peer, since_s: 60.0
        """Called with (who is waited for, since when on the monotonic clock) before a wait sleeps and
        whenever it wakes; returns the longest sleep in seconds, or raises to end the wait."""

    def post(self) -> None:
        """This rank's part of the phase is there for all to see."""
        if probe.listener is not None:
            probe.reached("phase", connections=[peer.connection for peer in self._peers])
        self._phase += 1
        self._words[0] = self._phase
        for peer in self._peers:
            os.eventfd_write(peer.outgoing, 1)

    def wait(self, *, spin: bool) -> None:
        """Return when every peer has posted as often as this rank.

        Args:
            spin: look for a moment, yielding the core, before going to sleep.

        Raises:
            RingpsError: what `attend` raised.
        """
        for peer in self._peers:
            if not peer.posts:
                self._await(peer, spin)
            peer.posts -= 1

    def wake(self) -> None:
        """Let a wait that sleeps call `attend`. Any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def _await(self, peer: Peer, spin: bool) -> None:
        if spin:
            words, phase = peer.words, self._phase
            limit_s = time.perf_counter() + _SPIN_S
            while words[0] < phase and time.perf_counter() < limit_s:
                os.sched_yield()
        since_s = time.monotonic()
        while True:
            try:
                peer.posts = os.eventfd_read(peer.incoming)
                return
            except BlockingIOError:
                pass
            limit_s = self.attend(peer, since_s)
            for descriptor, _ in peer.poller.poll(math.ceil(limit_s * 1000)):
                if descriptor == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                elif descriptor in self._owners:
                    self.gone.append(self._owners[descriptor])
                    for other in self._peers:
                        other.poller.unregister(descriptor)

    def close(self) -> None:
        """Nobody waits or wakes from here on."""
        os.close(self._wake_fd)
