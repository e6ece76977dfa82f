"""What a rank called: the text that people read and the number by which ranks compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective as its caller described it. Ranks agree if their texts are equal."""

    kind: str
    """`all_reduce`, `broadcast`, ..."""

    dtype: str
    shape: tuple[int, ...]
    op: str = ""
    src: int | None = None
    label: str = ""
    """A name for messages, such as `bucket 3`."""

    chunk_numel: int = 0
    """Elements of a chunk on the wire; 0 where there are none."""

    doubles: bool = False
    """By recursive doubling instead of on the ring."""

    @cached_property
    def text(self) -> str:
        """`all_reduce(sum, float32[64, 10], "bucket 3")` and how; names no two different calls alike."""
        if not self.chunk_numel:
            return str(self)
        way = " by recursive doubling" if self.doubles else ""
        return f"{self}{way} in chunks of {self.chunk_numel}"

    @cached_property
    def signature(self) -> int:
        """64 bits of BLAKE2b of the text; every chunk carries it."""
        return int.from_bytes(blake2b(self.text.encode(), digest_size=8).digest(), "little")

    @cached_property
    def _words(self) -> str:
        parts = [self.op] if self.op else []
        parts.append(f"{self.dtype}{list(self.shape)}")
        if self.src is not None:
            parts.append(f"src={self.src}")
        if self.label:
            parts.append(f'"{self.label}"')
        return f"{self.kind}({', '.join(parts)})"

    def __str__(self) -> str:
        return self._words


def disagreement(calls: tuple[str, ...]) -> bool:
    """Whether the ranks' answers to an inquiry name different calls.

    A rank that has not come to the call yet, or did not answer, is late and does not disagree.
    """
    return len({call.partition(" | ")[0] for call in calls if not call.startswith("no ")}) > 1
