"""The reduction of a model's gradients: which buckets there are, and when each is launched.

All ranks launch the same buckets in the same order, whatever order their gradients come in. A pass
through all buckets happens at the end of a synchronised backward, overlapping it, or in `settle`
for a rank that had none; so every rank has as many passes as any other.
"""

from __future__ import annotations

import itertools
import logging
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from ringps.buckets.agreement import Entry, agree
from ringps.buckets.device import DeviceBucket
from ringps.buckets.flat import FlatBucket, is_dense
from ringps.buckets.hooks import GradientHooks
from ringps.buckets.layout import Bucket, ParameterSpec, plan
from ringps.buckets.passes import CommitListener, Pass, SampleBook, Terms
from ringps.buckets.ring import ReductionRing
from ringps.buckets.tuning import CapTuner
from ringps.device import accelerator_of
from ringps.kernels.digest import combine, digest

_log = logging.getLogger(__name__)

_FIRST_CAP_BYTES = 8 * 1024 * 1024
"""Cap of the first pass, in which the order is learned, where caps are tuned."""
_REDUCIBLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class BucketSettings:
    """How gradients are bucketed and when they are reduced. The same on all ranks."""

    cap_bytes: int | Literal["auto"]
    """Most bytes of gradients in a bucket; "auto" tries some on the first passes and keeps the best."""

    first_cap_bytes: int
    """The same for the first bucket."""

    accumulate_steps: int = 1
    """Reduce at the end of every so many backward passes."""

    def __post_init__(self) -> None:
        for name in ("cap_bytes", "first_cap_bytes", "accumulate_steps"):
            value = getattr(self, name)
            if isinstance(value, str) and name == "cap_bytes":
                if value != "auto":
                    raise ValueError(f'cap_bytes must be a number of bytes or "auto", not {value!r}')
            elif value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class ReducerStatistics:
    """Counters since construction."""

    buckets: int
    """Buckets of the current layout; 0 in a ring of one and before the first reduction."""

    bucket_bytes: int
    """Their size in all."""

    cap_bytes: int
    """The cap of the current layout."""

    steps: int
    """Steps that were applied."""

    passes: int
    """Reductions of all buckets."""

    late_passes: int
    """Those that had to be done in `step()`, without overlap."""

    wait_s: float
    """Time that backward passes (and `step()`) waited for reductions after their own work was done."""


class Reducer:
    """Keeps the gradients of one optimizer's parameters the same on all ranks.

    Args:
        ring: the ranks.
        candidates: the optimizer's parameters at this time; those that require a gradient are
            reduced.
        name_of: a parameter's name, for messages.
        settings: see there.
        samples: which samples the ranks train. None: every rank has the same weight.
        listener: takes part in the commit of each pass.
    """

    def __init__(
        self,
        ring: ReductionRing,
        candidates: Callable[[], Iterable[torch.nn.Parameter]],
        name_of: Callable[[torch.Tensor], str],
        settings: BucketSettings,
        samples: SampleBook | None = None,
        listener: CommitListener | None = None,
    ) -> None:
        self._ring = ring
        self._candidates = candidates
        self._name = name_of
        self._settings = settings
        self._samples = samples
        self._listener = listener
        self._hooks = GradientHooks(self)
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)

        # The layout.
        self._parameters: list[torch.nn.Parameter] = []
        self._index_of: dict[int, int] = {}
        self._order: list[int] | None = None
        self._buckets: list[FlatBucket] | None = None
        self._bucket_of: list[tuple[int, int]] = []
        """By parameter: its bucket, and its position there."""
        self._bucket_sizes: list[int] = []
        self._changed = False
        self._cap_bytes = _FIRST_CAP_BYTES if settings.cap_bytes == "auto" else settings.cap_bytes
        self._tuner: CapTuner | None = None

        # The pass.
        self._synchronised = False
        self._exchanging = False
        self._recording = False
        """A backward is being captured in a graph, and computes nothing."""
        self._captured: dict[int, torch.Tensor | None] = {}
        """By parameter (its id): where replays of the graph leave its gradient."""
        self._seen: dict[int, None] = {}
        self._missing: list[int] = []
        """By bucket: gradients that have not arrived."""
        self._pass: Pass | None = None
        self._begun_s = 0.0
        self._idle_since_s = time.perf_counter()

        # The step.
        self.held = 0
        """Nesting depth of `no_sync()`."""
        self.backwards = 0
        """Backward passes since `next_step`."""
        self._step = 1
        self._passes_in_step = 0
        self._window = 0
        self._weight: float | None = None
        self._factor = 1.0
        self._reduced = False
        self._late = False
        self._somebody_late = False

        self._passes = 0
        self._late_passes = 0
        self._wait_s = 0.0
        self.refresh()
        self._changed = False

    def refresh(self) -> None:
        """Notice parameters that became trainable or ceased to be; a local matter.

        Raises:
            ValueError: one of them cannot be reduced.
        """
        trainable = [parameter for parameter in self._candidates() if parameter.requires_grad]
        if len(trainable) == len(self._parameters) and all(map(operator.is_, trainable, self._parameters)):
            return
        for parameter in trainable:
            check_parameter(self._name(parameter), parameter)
        _remove(self._handles)
        for parameter in trainable:
            self._handles += self._hooks.watch(parameter, scaled=self._samples is not None)
        self._parameters = trainable
        self._index_of = {id(parameter): index for index, parameter in enumerate(trainable)}
        self._order = self._buckets = None
        self._changed = True

    def prepare(self) -> None:
        """Clean up after a backward that an exception ended, and `refresh`."""
        self._hooks.settle(strict=False)
        self.refresh()

    def settle(self) -> None:
        """Make sure that every `.grad` is reduced, before it is applied.

        Joins the other ranks' reduction if this rank has not reduced since the last step; and if a
        rank did so, lets all ranks have the gradients as they are at one that did not, since its
        script may have changed them (clipping, unscaling).

        Raises:
            RingpsError: what the collectives raise.
        """
        self._hooks.settle(strict=True)
        self.refresh()
        if not self._exchanges:
            return
        if not self._reduced or self._changed:
            self._late = not self._reduced
            self._late_passes += 1
            self._seen = {}
            self._prepare()
            self._finish()
        if self._somebody_late:
            self._adopt()

    @property
    def replayed(self) -> bool:
        """Whether a backward was captured, and none has run otherwise since the last step."""
        return bool(self._captured) and self.backwards == 0 and not self._reduced

    def reduce(self) -> None:
        """Reduce the gradients that the replay of a captured backward has left.

        Raises:
            RuntimeError: no backward was captured.
            RingpsError: what the collectives raise.
        """
        self._hooks.settle(strict=True)
        self.refresh()
        if not self._captured:
            raise RuntimeError(
                "reduce() is for gradients of a captured CUDA graph, and no backward was captured"
            )
        for parameter in self._parameters:
            parameter.grad = self._captured.get(id(parameter))
        self._count_backward()
        if not self._exchanges:
            self._window, self._reduced = 0, True
            return
        self._seen = dict.fromkeys(range(len(self._parameters)))
        self._prepare()
        self._begun_s = time.perf_counter()
        self._finish()

    def next_evaluation(self) -> None:
        """The gradients at hand have been used; those of the next backward need a reduction anew."""
        self._reduced = self._late = self._somebody_late = False
        self._window = 0

    def next_step(self) -> int:
        """A step has been applied. Returns its number, from 1."""
        self.next_evaluation()
        self._step, self._passes_in_step, self.backwards = self._step + 1, 0, 0
        return self._step - 1

    @torch.no_grad()
    def mean(self, loss: torch.Tensor | float) -> torch.Tensor | float:
        """The mean of the ranks' losses, weighted as the gradients of the last backward."""
        if not self._exchanges:
            return loss
        total = torch.empty(2, dtype=torch.float64)

        def attempt(before: int) -> bytes:
            weight = 1 / self._ring.world_size if self._weight is None else self._weight * self._factor
            local = torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
            label = f"step {self._step}, loss"
            self._ring.raw.all_reduce_into(total, local, "sum", label=label).wait()
            return digest(total)

        self._ring.transact(attempt)
        if self._ring.elastic:
            total[0] /= total[1]  # the weights of those that are left
        total = total[:1]
        if isinstance(loss, torch.Tensor):
            return total.to(loss.device, loss.dtype).view(loss.shape)
        return float(total)

    @property
    def between_steps(self) -> bool:
        """Whether every gradient that there was has been applied."""
        return self.backwards == 0 and self._window == 0

    def progress(self) -> dict[str, Any]:
        """What a new member needs to go on together with the others: plain values."""
        return {
            "step": self._step,
            "passes": self._passes_in_step,
            "order": self._order,
            "cap_bytes": self._cap_bytes,
        }

    def go_on(self, progress: dict[str, Any]) -> None:
        """Go on from the others' `progress`."""
        self._step, self._passes_in_step = int(progress["step"]), int(progress["passes"])
        self._order = progress["order"]
        self._cap_bytes = int(progress["cap_bytes"])
        self._buckets, self._tuner = None, None

    def statistics(self) -> ReducerStatistics:
        """Counters; see `ReducerStatistics`."""
        return ReducerStatistics(
            buckets=len(self._buckets or ()),
            bucket_bytes=sum(bucket.input_bytes for bucket in self._buckets or ()),
            cap_bytes=self._cap_bytes,
            steps=self._step - 1,
            passes=self._passes,
            late_passes=self._late_passes,
            wait_s=self._wait_s,
        )

    # PassListener

    def begin(self) -> None:
        self.refresh()
        self._recording = self._capturing()
        if self._recording:
            self._synchronised = self._exchanging = False
            self._factor = 1.0
            return
        self._count_backward()
        self._synchronised = not self.held and self._window >= self._settings.accumulate_steps
        self._exchanging = self._synchronised and self._exchanges
        self._seen = {}
        if self._exchanging:
            self._prepare()
            self._begun_s = time.perf_counter()
        elif not self._synchronised:
            self._reduced = False

    def _count_backward(self) -> None:
        self.backwards += 1
        self._window += 1
        if self._samples is not None:
            weight = self._samples.next()
            if self._window == 1 or self._weight is None:
                self._weight = weight or 1.0  # a batch that only pads counts nothing, by its factor
            self._factor = weight / self._weight

    def _capturing(self) -> bool:
        device = accelerator_of(self._parameters[0]) if self._parameters else None
        return device is not None and device.capturing()

    def factor(self) -> float:
        return self._factor

    def arrived(self, key: int) -> None:
        index = self._index_of.get(key)
        if index is None:
            return
        if index in self._seen:
            self._arrived_again(index)
            return
        self._seen[index] = None
        if not self._exchanging:
            return
        bucket, position = self._bucket_of[index]
        assert self._buckets is not None
        self._buckets[bucket].load(position, self._load_weight())
        self._missing[bucket] -= 1
        assert self._pass is not None
        while self._pass.closed < len(self._missing) and not self._missing[self._pass.closed]:
            self._close(self._pass)

    def complete(self) -> bool:
        return len(self._seen) == len(self._parameters)

    def end(self) -> None:
        if self._recording:
            self._recording = False
            self._captured = {id(one): one.grad for one in self._parameters}
        elif self._exchanging:
            self._exchanging = False
            self._finish()
        elif self._synchronised:
            self._window, self._reduced = 0, True

    def abandoned(self) -> None:
        if self._recording:
            self._recording = False
            return
        self._exchanging = False
        self._window -= 1
        self.backwards -= 1
        if self._pass is not None:
            self._pass.abandon()  # the next pass needs its memory

    # Passes

    def _prepare(self) -> None:
        """Have buckets, all of them empty."""
        if self._buckets is None:
            if self._changed:
                agree(self._ring, [describe(self._name(one), one) for one in self._parameters])
                self._changed = False
            self._lay_out()
        assert self._buckets is not None
        self._missing = list(self._bucket_sizes)
        number = self._passes_in_step + 1
        terms = Terms(
            step=self._step,
            label=f"step {self._step}, pass {number}" if number > 1 else f"step {self._step}",
            weight=self._load_weight(),
            late=self._late,
            batches=max(1, self._settings.accumulate_steps),
            compares=number == 1,
        )
        self._pass = Pass(self._ring, self._buckets, terms, self._samples, self._listener)

    def _lay_out(self) -> None:
        specs = [
            ParameterSpec(numel=one.numel(), dtype=_kind(one), itemsize_bytes=one.itemsize)
            for one in self._parameters
        ]
        # Until the order is known: models call their layers in about the order of construction.
        order = list(reversed(range(len(specs)))) if self._order is None else self._order
        cap_bytes, first = self._cap_bytes, self._settings.first_cap_bytes
        self._buckets = None  # their memory may be needed for the new ones
        layout = plan(specs, order, cap_bytes=cap_bytes, first_cap_bytes=min(first, cap_bytes))
        names = [self._name(one) for one in self._parameters]
        self._buckets = [self._bucket(bucket, names) for bucket in layout]
        self._bucket_sizes = [len(bucket.slots) for bucket in layout]
        self._bucket_of = [(0, 0)] * len(specs)
        for number, bucket in enumerate(layout):
            for position, slot in enumerate(bucket.slots):
                self._bucket_of[slot.parameter] = number, position

    def _bucket(self, bucket: Bucket, names: Sequence[str]) -> FlatBucket:
        device = accelerator_of(self._parameters[bucket.slots[0].parameter])
        if device is None:
            return FlatBucket(bucket, self._parameters, names, self._ring)
        return DeviceBucket(bucket, self._parameters, names, self._ring, device)

    def _arrived_again(self, index: int) -> None:
        if not self._exchanging:
            return
        bucket, position = self._bucket_of[index]
        assert self._pass is not None
        if bucket < self._pass.closed:
            raise RuntimeError(
                f'"{self._name(self._parameters[index])}" got a second gradient in one backward after its '
                "first was sent, as happens when layers share it inside reentrant activation checkpointing; "
                "use torch.utils.checkpoint with use_reentrant=False"
            )
        assert self._buckets is not None
        self._buckets[bucket].load(position, self._load_weight())

    def _load_weight(self) -> float | None:
        """What gradients are multiplied by before they are added up; None: the ring takes the mean."""
        if self._samples is None:
            return None
        return 1 / self._ring.world_size if self._weight is None else self._weight

    @property
    def _exchanges(self) -> bool:
        """Whether gradients go through buckets: also of a ring of one that may grow."""
        return self._ring.world_size > 1 or self._ring.elastic

    def _close(self, this: Pass) -> None:
        if this.closed == 0:
            self._passes_in_step += 1
        this.close()

    def _finish(self) -> None:
        """Hand over what is left, wait for everything and put the results where they belong."""
        this = self._pass
        assert this is not None and self._buckets is not None
        while this.closed < len(self._buckets):
            self._close(this)
        begun_s = time.perf_counter()
        outcome = this.commit(int((begun_s - self._idle_since_s) * 1e6))
        for bucket, flags in zip(self._buckets, _fetched(self._buckets), strict=True):
            self._somebody_late |= bucket.publish(flags)
        self._idle_since_s = time.perf_counter()
        self._wait_s += self._idle_since_s - begun_s
        self._pass = None
        self._passes += 1
        self._window, self._reduced = 0, True
        if self._samples is not None and this.account:
            self._samples.book(this.account, this.account_rank)
        if self._listener is not None:
            self._listener.committed(self._step, outcome)
        if self._order is None:
            self._learn_order()
        elif self._tuner is not None:
            self._tune(self._tuner)

    def _learn_order(self) -> None:
        """Take over the order in which gradients arrived on rank 0, if any did."""
        order = torch.full((len(self._parameters),), -1)
        seen = torch.tensor(list(self._seen), dtype=torch.int64)

        def attempt(before: int) -> bytes:
            order.fill_(-1)[: len(seen)] = seen
            self._ring.raw.broadcast(order, 0)
            return digest(order)

        self._ring.transact(attempt)
        arrived = [index for index in order.tolist() if index >= 0]
        if arrived:
            known = set(arrived)
            rest = [index for index in reversed(range(len(order))) if index not in known]
            self._order, self._buckets = arrived + rest, None
            if self._settings.cap_bytes == "auto":
                self._tuner = CapTuner(sum(parameter.nbytes for parameter in self._parameters))
                self._cap_bytes = self._tuner.cap_bytes

    def _tune(self, tuner: CapTuner) -> None:
        """Note how long the pass took; go on to the next cap when this one has been tried enough."""
        if not tuner.record(time.perf_counter() - self._begun_s):
            return
        if tuner.tried:
            slowest_s = torch.empty(len(tuner.candidates), dtype=torch.float64)
            local_s = torch.tensor(tuner.durations_s(), dtype=torch.float64)

            def attempt(before: int) -> bytes:
                self._ring.raw.all_reduce_into(slowest_s, local_s, "max", label="bucket sizes").wait()
                return digest(slowest_s)

            self._ring.transact(attempt)
            self._cap_bytes, reason = tuner.choose(slowest_s.tolist())
            self._tuner = None
            _log.info("bucket_cap_bytes=%d: %s", self._cap_bytes, reason)
        else:
            self._cap_bytes = tuner.cap_bytes
        self._buckets = None

    def _adopt(self) -> None:
        if self._buckets is None:
            self._lay_out()

        def attempt(before: int) -> bytes:
            assert self._buckets is not None
            late = self._ring.raw.gather_bytes(b"late" if self._late else b"")
            if b"" in late:
                for bucket in self._buckets:
                    bucket.adopt(late.index(b""))
            return combine([digest(bucket.output) for bucket in self._buckets])

        self._ring.transact(attempt)


def check_parameter(name: str, parameter: torch.Tensor) -> None:
    """
    Raises:
        ValueError: gradients of this parameter cannot be reduced.
    """
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f'"{name}" has no shape yet; run the model once before you wrap its optimizer')
    try:
        accelerator_of(parameter)
    except ValueError as error:
        raise ValueError(f'"{name}": {error}') from None
    if parameter.layout is not torch.strided:
        raise ValueError(f'"{name}" is sparse; ringps reduces dense parameters only')
    if parameter.dtype not in _REDUCIBLE:
        raise ValueError(f'"{name}" is {parameter.dtype}; ringps reduces real floating-point gradients only')
    gradient_dtype = getattr(parameter, "grad_dtype", None)
    if gradient_dtype not in (None, parameter.dtype):
        raise ValueError(
            f'"{name}" is {parameter.dtype} but its gradients are {gradient_dtype}; '
            "ringps needs them to be of one dtype"
        )


def describe(name: str, tensor: torch.Tensor) -> Entry:
    """Name, dtype, shape, kind of device, memory order and trainability, for `agree`."""
    text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if accelerator_of(tensor) is not None:
        text += " on a GPU"
    if not tensor.is_contiguous() and is_dense(tensor):
        text += f" with strides {list(tensor.stride())}"
    return name, text + (", trainable" if tensor.requires_grad else "")


def _kind(parameter: torch.Tensor) -> str:
    """Parameters of one kind can be in one bucket."""
    return f"{parameter.dtype}{'' if accelerator_of(parameter) is None else ' on a GPU'}"


def _fetched(buckets: Sequence[FlatBucket]) -> Sequence[list[float] | None]:
    """All buckets' flags, by one copy from a GPU instead of one for each; None where a bucket can tell."""
    flags = [bucket.output_flags for bucket in buckets]
    if not all(one.is_cuda for one in flags):
        return [None] * len(flags)
    everything: list[float] = torch.cat([one.to(torch.float32) for one in flags]).tolist()
    ends = itertools.accumulate(len(one) for one in flags)
    return [everything[end - len(one) : end] for end, one in zip(ends, flags, strict=True)]


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
