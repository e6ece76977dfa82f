"""Where the elements that another member puts in are read from."""

from __future__ import annotations

from collections.abc import Sequence

from ringps.collectives.shm.signals import Peer
from ringps.kernels.fold import Block
from ringps.ring.partition import Slice


class PeerUnreadable(Exception):
    """A peer's memory cannot be read any more. Not for users: the backend says why."""

    def __init__(self, peer: Peer, error: OSError) -> None:
        super().__init__(f"its memory cannot be read: {error.strerror}")
        self.peer = peer


class Mapped:
    """A source that lies in this process's address space."""

    def __init__(self, elements: Block) -> None:
        self._elements = elements

    def block(self, start: int, stop: int, into: Block, address: int) -> Block:
        """Elements start..stop: a view, or `into`, which lies at `address`, filled with them."""
        return self._elements[start:stop]


class Private:
    """A source that only its process has mapped."""

    def __init__(self, peer: Peer, position: int, itemsize: int) -> None:
        self._peer = peer
        self._remote = peer.remote
        self._position = position
        self._itemsize = itemsize

    def block(self, start: int, stop: int, into: Block, address: int) -> Block:
        item = self._itemsize
        try:
            self._remote.read(self._position + start * item, address, (stop - start) * item)
        except OSError as error:
            raise PeerUnreadable(self._peer, error) from error
        return into[: stop - start]


class Staged:
    """A source of which only the current piece is at hand, its slices' parts one after the other; or the
    own one (`staging` is None), which the others see so."""

    def __init__(self, elements: Block, staging: Block | None = None) -> None:
        self._elements = elements
        self._staging = staging
        self.piece: Sequence[Slice] = ()

    def block(self, start: int, stop: int, into: Block, address: int) -> Block:
        if self._staging is None:
            return self._elements[start:stop]
        before = 0
        for part in self.piece:
            if part.start <= start < part.stop:
                return self._staging[before + start - part.start : before + stop - part.start]
            before += part.numel
        raise AssertionError("not of this piece")


Source = Mapped | Private | Staged
