"""What a member reads of another one's input."""

from __future__ import annotations

from typing import NamedTuple

from ringps.kernels.fold import Block


class Part(NamedTuple):
    """Bytes start..stop of member `local`'s source go to `to` and what follows."""

    local: int
    start: int
    stop: int
    to: int


class Source:
    """A member's input: all of it, or the current piece in one of two areas with a place for each member."""

    def __init__(self, elements: Block, place_numel: int = 0) -> None:
        self._elements = elements
        self._place_numel = place_numel
        self._shift = 0

    @property
    def staged(self) -> bool:
        """Only a piece at a time is at hand."""
        return self._place_numel > 0

    def turn_to(self, start: int, place: int) -> None:
        """The current piece begins with element `start`, and lies at place number `place`."""
        if self.staged:
            self._shift = place * self._place_numel - start

    def block(self, start: int, stop: int) -> Block:
        """Elements start..stop, of the current piece."""
        return self._elements[start + self._shift : stop + self._shift]
