"""Collectives among the processes of one host, through shared memory.

Every byte of shared memory has one writer, so a process that died or hangs can spoil nothing. A rank's
segment holds, one after the other:

====== ==============================================================================
header a page of 64-bit words: the phase, and what it called (two descriptors)
slots  2 x 64 KiB: small inputs
outbox 2 pieces: results of its slice
heap   the rest, sparse: tensors of `ringps.empty`, staged inputs
====== ==============================================================================

*Small tensors*: every rank puts its input into a slot and reduces all slots itself; one phase.
*Large tensors*: rank i reduces slice i straight from all inputs, piece by piece, to its outbox and its
own output; in the next phase the others copy the piece from the outbox. Inputs are only read, and only
until the last piece is reduced; outputs are written by their owner alone. Where an output lies in shared
memory, all pieces but the last are copied from there: nobody returns, and may change its output, before
all have posted the last piece, and so have copied those before.

Slots and outboxes take turns. A rank posts phase p + 1 only after it has done with what phase p offered; so
who has waited for p + 1 may overwrite what was offered in p, and no barrier is needed at the end.

Elements are combined in the order of `ring.schedule`: of recursive doubling where it would be used, and
else of the ring. So the bits are those of the same members over TCP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ringps.collectives.shm.memory import PAGE_BYTES, Area
from ringps.collectives.shm.signals import Peer, Signals
from ringps.collectives.shm.sources import Part, Source
from ringps.config import MOST_DOUBLING_BYTES
from ringps.errors import CollectiveError
from ringps.kernels.cpu import ReduceOp
from ringps.kernels.digest import Digest
from ringps.kernels.fold import Block, Fold, fold_of
from ringps.ring.partition import Slice, partition

SLOT_BYTES = MOST_DOUBLING_BYTES
"""Largest input that is copied to all, and the largest that every rank may reduce by itself."""
MOST_PIECE_BYTES = 1 << 20
LEAST_PIECE_BYTES = 128 * 1024
_CACHED_BYTES = 4 << 20
"""What all members together have staged or offered at a time, so that it is in cache when it is read."""
_BLOCK_BYTES = 256 * 1024
"""What is reduced at once: all inputs' blocks fit into a core's cache."""

_SLOTS = PAGE_BYTES
_OUTBOX = _SLOTS + 2 * SLOT_BYTES
HEAP_START = _OUTBOX + 2 * MOST_PIECE_BYTES
"""Bytes of a segment that are used from the beginning."""

_DESCRIPTORS = (8, 16)
"""First words of the two descriptors: sequence, signature, kind and position of the source, position of
the output or 0."""
_NOTHING, _SHARED, _STAGED = range(3)


def forget_phases(area: Area) -> None:
    """Make an area's header that of a group that has not begun, before peers of the next one see it."""
    area.segment.bytes[:PAGE_BYTES] = 0


class Disagreement(Exception):
    """A peer called something else. Not for users: the backend finds out who called what."""


class LocalGroup:
    """The members on one host. Used by one thread at a time."""

    def __init__(self, area: Area, peers: Sequence[Peer], local: int, *, small_bytes: int) -> None:
        """
        Args:
            area: this rank's; it outlives the group.
            peers: the others, connected.
            local: this rank's position among all.
            small_bytes: largest input that every rank reduces by itself; at most `SLOT_BYTES`.
        """
        self.size = len(peers) + 1
        self._small_bytes = small_bytes
        piece_bytes = max(_CACHED_BYTES // self.size**2 // PAGE_BYTES * PAGE_BYTES, LEAST_PIECE_BYTES)
        self._piece_bytes = min(piece_bytes, MOST_PIECE_BYTES)
        """What a rank reduces between two phases."""
        self.local = local
        self._area = area
        self.segment = area.segment
        self.peers = peers
        self._words = memoryview(area.segment.memory).cast("Q")
        self.signals = Signals(self._words, peers)
        self._heap = area.heap
        self._by_local = {peer.local: peer for peer in peers}
        self.order = [(local + 1 + hop) % self.size for hop in range(self.size)]
        """Positions of the members in the order in which this one combines its slice."""
        self.spin = False
        """Look for a moment before going to sleep; for calls whose caller waits."""
        self._meetings = 0
        self._pieces = 0
        self._slot = 0
        self._staging: torch.Tensor | None = None
        self._stages = False
        """Of the collective under way: this member's source is staged."""
        self._sums = np.empty(_BLOCK_BYTES, np.uint8)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """See `Heap.allocate`. Any thread."""
        return self._heap.allocate(size_bytes)

    # The collectives. `call` is (sequence, signature); tensors are flat, contiguous and on the CPU.

    def barrier(self, call: tuple[int, int]) -> None:
        """Return when all have come."""
        self.meet(call)

    def all_reduce(
        self,
        call: tuple[int, int],
        source: torch.Tensor,
        output: torch.Tensor,
        op: ReduceOp,
        world_size: int,
        digest: Digest | None = None,
    ) -> None:
        """Every member's `output`, which may be `source`, becomes the reduction of all sources. Its parts go
        to `digest`, if there is one, as they become complete."""
        fold = fold_of(source.dtype, op)
        if source.nbytes <= self._small_bytes:
            self._all_reduce_small(call, fold, source, output, world_size)
            return
        slices = partition(source.numel(), self.size)
        own, out = fold.of(source), fold.of(output)
        pieces = self.pieces_of(fold, slices)
        sources = self.open(call, source, fold, pieces, output)
        outputs = self._outputs(fold, source.numel())
        for at, piece in enumerate(pieces):
            self.turn_to(sources, at, piece)
            mine, box, last = piece[self.local], self.next_box(), piece is pieces[-1]
            through_box = last or outputs[self.local] is None
            result = self.box(fold, box, mine.numel) if through_box else out[mine.start : mine.stop]
            for start, stop, partial, block in self.reduced(fold, sources, mine, result):
                fold.finish(partial, block, world_size)
                if through_box:
                    out[start:stop] = block
            self.stage(own, pieces, at + 1)
            self.phase()
            self.collect(fold, piece, box, out, () if last else outputs)
            if digest is not None:
                for start, stop in piece:
                    digest.add(out[start:stop])

    def reduce_scatter(
        self, call: tuple[int, int], source: torch.Tensor, output: torch.Tensor, op: ReduceOp, world_size: int
    ) -> None:
        """`output` becomes this member's slice of the reduction of all sources."""
        fold = fold_of(source.dtype, op)
        slices = partition(source.numel(), self.size)
        own, out, base = fold.of(source), fold.of(output), slices[self.local].start
        pieces = self.pieces_of(fold, slices)
        sources = self.open(call, source, fold, pieces)
        for at, piece in enumerate(pieces):
            self.turn_to(sources, at, piece)
            mine = piece[self.local]
            target = out[mine.start - base : mine.stop - base]
            for _, _, partial, block in self.reduced(fold, sources, mine, target):
                fold.finish(partial, block, world_size)
            self.stage(own, pieces, at + 1)
            if at + 1 == len(pieces) or self.staged(sources):
                self.phase()

    def all_gather(self, call: tuple[int, int], source: torch.Tensor, output: torch.Tensor) -> None:
        """`output` becomes all sources (uint8), one after the other."""
        size = source.numel()
        out = output.numpy()
        out[self.local * size : (self.local + 1) * size] = source.numpy()
        self.copy(call, source, [Part(peer.local, 0, size, peer.local * size) for peer in self.peers], out)

    def broadcast(self, call: tuple[int, int], tensor: torch.Tensor, src: int) -> None:
        """`tensor` (uint8) becomes that of member `src`."""
        wanted = [] if src == self.local else [Part(src, 0, tensor.numel(), 0)]
        self.copy(call, tensor, wanted, tensor.numpy())

    def copy(
        self, call: tuple[int, int], source: torch.Tensor, wanted: Sequence[Part], out: np.ndarray
    ) -> None:
        """Take what this member wants of the others' sources.

        Args:
            call: as ever.
            source: flat uint8, of the same size at every member; not to be changed where others read it.
            wanted: parts of it at other members.
            out: uint8; where they go.
        """
        size = source.numel()
        if size <= SLOT_BYTES:
            place = self._next_slot()
            self.segment.bytes[place : place + size] = source.numpy()
            self.meet(call)
            for local, start, stop, to in wanted:
                theirs = self._by_local[local].segment.bytes
                out[to : to + stop - start] = theirs[place + start : place + stop]
            return
        fold = fold_of(torch.uint8, "max")
        parts = [Slice(at, min(at + self._piece_bytes, size)) for at in range(0, size, self._piece_bytes)]
        # Everybody gets the same part, so it is staged once.
        pieces = [[part] for part in parts]
        sources = self.open(call, source, fold, pieces)
        staged = self.staged(sources)
        if not staged:
            parts, pieces = [Slice(0, size)], [[Slice(0, size)]]
        own = source.numpy()
        for at, (begin, end) in enumerate(parts):
            self.turn_to(sources, at, pieces[at])
            for local, start, stop, to in wanted:
                first, last = max(start, begin), min(stop, end)
                if first < last:
                    out[to + first - start : to + last - start] = sources[local].block(first, last)
            if staged:
                self.stage(own, pieces, at + 1)
            self.phase()

    # Their parts, which the hierarchical collectives use too.

    def _all_reduce_small(
        self, call: tuple[int, int], fold: Fold, source: torch.Tensor, output: torch.Tensor, world_size: int
    ) -> None:
        numel = source.numel()
        place = self._next_slot()
        mine = fold.block(self.segment.memory, place, numel)
        own = fold.of(source)
        mine[:] = own
        self.meet(call)
        inputs = [
            mine if local == self.local else fold.block(self._by_local[local].segment.memory, place, numel)
            for local in range(self.size)
        ]
        out = own if output is source else fold.of(output)
        partial = out if fold.partial_dtype is fold.dtype else fold.partial_of(fold.scratch(numel))
        fold.pairwise(inputs, partial)
        fold.finish(partial, out, world_size)

    def open(
        self,
        call: tuple[int, int],
        source: torch.Tensor,
        fold: Fold,
        pieces: Sequence[Sequence[Slice]],
        output: torch.Tensor | None = None,
    ) -> list[Source]:
        """Meet the others and get at their sources.

        Args:
            call: what is called.
            source: this member's input.
            fold: for its dtype.
            pieces: in which it is read, if it must be staged.
            output: which others may read, where it is shared.

        Returns:
            By position.

        Raises:
            Disagreement: somebody calls something else.
        """
        self._stages = bool(pieces) and self._offset(source) is None
        self.stage(fold.of(source), pieces, 0)
        self.meet(call, source, output)
        sources: list[Source] = []
        if not pieces:
            return sources
        words = _DESCRIPTORS[self._meetings & 1]
        numel, size = source.numel(), source.nbytes
        for local in range(self.size):
            if local == self.local:
                sources.append(Source(fold.of(source)))
                continue
            peer = self._by_local[local]
            kind, position = peer.words[words + 2], peer.words[words + 3]
            room = size if kind == _SHARED else 2 * self.size * self._piece_bytes
            if kind not in (_SHARED, _STAGED) or position + room > peer.segment.size_bytes:
                raise CollectiveError(f"rank {peer.rank} offers memory that it does not have")
            if kind == _SHARED:
                sources.append(Source(fold.block(peer.segment.memory, position, numel)))
            else:
                staging = fold.block(peer.segment.memory, position, room // fold.itemsize)
                sources.append(Source(staging, self.piece_numel(fold)))
        return sources

    def meet(
        self,
        call: tuple[int, int],
        source: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
    ) -> None:
        """Say what this rank calls and where its source is, and wait until all have.

        Raises:
            Disagreement: somebody calls something else.
        """
        self._meetings += 1
        sequence, signature = call
        first = _DESCRIPTORS[self._meetings & 1]
        words = self._words
        words[first], words[first + 1] = sequence, signature
        words[first + 2], words[first + 3] = self._expose(source)
        words[first + 4] = 0 if output is None else self._offset(output) or 0
        self.phase()
        for peer in self.peers:
            if peer.words[first] != sequence or peer.words[first + 1] != signature:
                raise Disagreement

    def _expose(self, source: torch.Tensor | None) -> tuple[int, int]:
        if source is None:
            return _NOTHING, 0
        offset = self._offset(source)
        if offset is not None:
            return _SHARED, offset
        if not self._stages:
            return _NOTHING, 0  # it is empty
        assert self._staging is not None
        return _STAGED, self._staging.data_ptr() - self.segment.address

    def _offset(self, tensor: torch.Tensor) -> int | None:
        """Where in this rank's segment a tensor lies, if it does."""
        offset = tensor.data_ptr() - self.segment.address
        return offset if 0 <= offset < self.segment.size_bytes else None

    def pieces_of(self, fold: Fold, slices: Sequence[Slice]) -> list[list[Slice]]:
        """The slices' parts that belong to each phase; as many on all members."""
        numel = self.piece_numel(fold)
        longest = max(part.numel for part in slices)
        starts = range(0, longest, numel)
        return [
            [
                Slice(min(part.start + at, part.stop), min(part.start + at + numel, part.stop))
                for part in slices
            ]
            for at in starts
        ]

    def stage(self, own: Block, pieces: Sequence[Sequence[Slice]], at: int) -> None:
        """Where the own source must be staged: copy the others' parts of piece `at` there."""
        if not self._stages or at >= len(pieces):
            return
        if self._staging is None:
            self._staging = self._heap.allocate(2 * self.size * self._piece_bytes)
        piece = pieces[at]
        room = (
            self._staging.numpy().view(own.dtype)
            if isinstance(own, np.ndarray)
            else self._staging.view(own.dtype)
        )
        numel = self._piece_bytes // own.itemsize
        for local, part in enumerate(piece):
            if part.numel and (local != self.local or len(piece) == 1):
                to = ((at & 1) * self.size + local) * numel
                room[to : to + part.numel] = own[part.start : part.stop]

    def staged(self, sources: Sequence[Source]) -> bool:
        """Whether pieces become available one by one."""
        return self._stages or any(one.staged for one in sources)

    def turn_to(self, sources: Sequence[Source], at: int, piece: Sequence[Slice]) -> None:
        """This member will read its part of piece `at`, or the only part."""
        place = 0 if len(piece) == 1 else self.local
        for one in sources:
            one.turn_to(piece[place].start, (at & 1) * self.size + place)

    def reduced(
        self, fold: Fold, sources: Sequence[Source], mine: Slice, target: Block
    ) -> Iterator[tuple[int, int, Block, Block]]:
        """Combine all sources in `mine`, block by block: (start, stop, combined, its place in `target`).

        What is combined lies in its place already, but for 16-bit floats, which add up in scratch memory.
        """
        wide = fold.partial_dtype is not fold.dtype
        numel = _BLOCK_BYTES // fold.itemsize
        sums: Block = fold.scratch(numel) if wide else fold.block(self._sums, 0, numel)
        head, *others = [sources[local] for local in self.order]
        for start in range(mine.start, mine.stop, numel):
            stop = min(start + numel, mine.stop)
            place = target[start - mine.start : stop - mine.start]
            combined = head.block(start, stop)
            if not others:
                place[:] = combined
                combined = place
            for count, one in enumerate(others, 1):
                # The target may be this rank's input, which comes last; nothing goes there before.
                into = place if count == len(others) and not wide else sums[: stop - start]
                fold.partial(combined, one.block(start, stop), into)
                combined = into
            yield start, stop, combined, place

    def reduce(self, fold: Fold, sources: Sequence[Source], mine: Slice, partial: Block) -> None:
        """Combine all sources in `mine`, into `partial`, which has the partial dtype."""
        for start, stop, block, _ in self.reduced(fold, sources, mine, partial):
            if fold.partial_dtype is not fold.dtype:
                partial[start - mine.start : stop - mine.start] = block

    def box(self, fold: Fold, box: int, numel: int) -> Block:
        """Elements of this member's outbox."""
        return fold.block(self.segment.memory, box, numel)

    def piece_numel(self, fold: Fold) -> int:
        """Most elements of a slice in a piece."""
        return self._piece_bytes // fold.itemsize

    def collect(
        self,
        fold: Fold,
        piece: Sequence[Slice],
        box: int,
        out: Block,
        outputs: Sequence[Block | None] = (),
    ) -> None:
        """Copy the others' results of a posted piece, from their outputs or else their outboxes."""
        for local in self.order[:-1]:
            start, stop = piece[local]
            if start == stop:
                continue
            theirs = outputs[local] if outputs else None
            if theirs is not None:
                out[start:stop] = theirs[start:stop]
            else:
                out[start:stop] = fold.block(self._by_local[local].segment.memory, box, stop - start)

    def _outputs(self, fold: Fold, numel: int) -> list[Block | None]:
        """Members' outputs, where they lie in shared memory; by position."""
        first = _DESCRIPTORS[self._meetings & 1]
        size, found = numel * fold.itemsize, []
        for local in range(self.size):
            peer = self._by_local.get(local)
            words, segment = (self._words, self.segment) if peer is None else (peer.words, peer.segment)
            position = words[first + 4]
            if position + size > segment.size_bytes:
                raise CollectiveError(f"member {local} offers memory that it does not have")
            found.append(fold.block(segment.memory, position, numel) if position else None)
        return found

    def phase(self) -> None:
        self.signals.post()
        self.signals.wait(spin=self.spin)

    def next_box(self) -> int:
        self._pieces += 1
        return _OUTBOX + (self._pieces & 1) * self._piece_bytes

    def _next_slot(self) -> int:
        self._slot ^= 1
        return _SLOTS + self._slot * SLOT_BYTES

    def close(self) -> None:
        """Close all but this rank's area."""
        self.signals.close()
        for peer in self.peers:
            peer.close()
