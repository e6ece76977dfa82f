"""The memory of one bucket: gradients in, reduced gradients out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringps.buckets.layout import Bucket
from ringps.buckets.ring import PendingReduction, ReductionRing
from ringps.kernels.digest import Digest


class FlatBucket:
    """An input and an output tensor, and every parameter's views of them.

    `load` copies a gradient to the input when it has arrived, and `close` those that have not; the input
    stays as it is until the next pass, so that `launch` can reduce it to the output as often as it takes. The
    parameters' `.grad` are views of the output once it is closed, so that the memory of their own gradients
    is free for the next layer's.
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        ring: ReductionRing,
    ) -> None:
        """
        Args:
            bucket: its plan; `bucket.slots` index `parameters` and `names`.
            parameters: all parameters of the layout; the bucket's are on one device.
            names: for messages.
            ring: gives the input's memory, and reduces it.
        """
        first = parameters[bucket.slots[0].parameter]
        self._ring = ring
        self._input = ring.empty_beside(first, bucket.numel, first.dtype).zero_()
        self._output = ring.empty_beside(first, bucket.numel, first.dtype).zero_()
        self._input_flags = self._input[bucket.flags_start :]
        self._output_flags = self._output[bucket.flags_start :]
        self._names = [names[slot.parameter] for slot in bucket.slots]
        self._views = [
            (parameter, _like(parameter, self._input, slot.start), _like(parameter, self._output, slot.start))
            for slot in bucket.slots
            for parameter in (parameters[slot.parameter],)
        ]

        self._loaded = [False] * len(self._views)
        self._present = [False] * len(self._views)
        self._flags: list[bool] = []
        """What the input's flags are."""

    @property
    def input_bytes(self) -> int:
        """Size of the tensor that travels."""
        return self._input.nbytes

    def load(self, position: int, weight: float | None) -> None:
        """Copy the `.grad` of slot `position`, times `weight`, to the input; zeros if it is None.

        Raises:
            ValueError: the gradient is sparse.
        """
        _, view, _ = self._views[position]
        gradient = self._take(position)
        if gradient is None:
            view.zero_()
        elif weight is None:
            view.copy_(gradient)
        else:
            torch.mul(gradient, weight, out=view)

    def _take(self, position: int) -> torch.Tensor | None:
        """The gradient of a slot, which counts as loaded from here on."""
        gradient = self._views[position][0].grad
        self._loaded[position] = True
        self._present[position] = gradient is not None
        if gradient is not None and gradient.layout is not torch.strided:
            raise ValueError(
                f'the gradient of "{self._names[position]}" is sparse, and ringps reduces dense '
                "gradients only; construct its layer with sparse=False"
            )
        return gradient

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those whose gradients are in it."""
        return [parameter for parameter, _, _ in self._views]

    @property
    def output(self) -> torch.Tensor:
        """The flat tensor of reduced gradients and flags."""
        return self._output

    @property
    def output_flags(self) -> torch.Tensor:
        """Of the parameters: whether any rank has a gradient; and of the ranks: whether any raised its
        flag."""
        return self._output_flags

    @torch.no_grad()
    def close(self, weight: float | None, rank_flag: bool) -> None:
        """Load what has not been loaded, and let go of the parameters' own gradients: the input is complete.

        Raises:
            ValueError: as `load`.
        """
        for position, loaded in enumerate(self._loaded):
            if not loaded:
                self.load(position, weight)
        self._fill(weight)
        flags = [*self._present, rank_flag]
        if flags != self._flags:
            self._input_flags.copy_(torch.tensor(flags))
            self._flags = flags
        self.reset()
        for parameter, _, view in self._views:
            if parameter.grad is not None and parameter.grad is not view:
                parameter.grad = view

    def _fill(self, weight: float | None) -> None:
        """All slots have been loaded."""

    def launch(
        self, op: str, label: str, then: Callable[[], object] | None, digest: Digest | None
    ) -> PendingReduction:
        """Start the reduction of the input, which must be complete, to the output.

        Args:
            op: how to combine.
            label: names it in messages, and the same on all ranks.
            then: called when it is done, on any thread.
            digest: is fed with the output where that costs little.
        """
        return self._ring.raw.all_reduce_into(
            self._output, self._input, op, label=label, then=then, digest=digest
        )

    def blank(self) -> None:
        """Let this rank contribute nothing."""
        self._input.zero_()
        self._flags = []

    def reset(self) -> None:
        """A new pass: nothing has been loaded."""
        self._loaded = [False] * len(self._views)

    def publish(self, flags: Sequence[float] | None = None) -> bool:
        """Let every `.grad` be the reduced one, or None if no rank has one.

        Args:
            flags: `output_flags`, if they have been fetched already.

        Returns:
            Whether any rank had raised its flag.
        """
        *present, rank_flag = self._output_flags.tolist() if flags is None else flags
        for flag, (parameter, _, view) in zip(present, self._views, strict=True):
            wanted = view if flag else None
            if parameter.grad is not wanted:
                parameter.grad = wanted
        return bool(rank_flag)

    @torch.no_grad()
    def adopt(self, src: int) -> None:
        """Let every `.grad` be what it is at rank `src` now."""
        flags = [parameter.grad is not None for parameter, _, _ in self._views]
        for parameter, _, view in self._views:
            if parameter.grad is not None and parameter.grad is not view:
                view.copy_(parameter.grad)
        self._output_flags.copy_(torch.tensor([*flags, False]))
        self._ring.raw.broadcast(self._output, src)
        self.publish()


def _like(parameter: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
    """The slot's elements with the parameter's shape, and its strides where they leave no gaps."""
    if is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), start)
    return flat[start : start + parameter.numel()].view(parameter.shape)


def is_dense(tensor: torch.Tensor) -> bool:
    """The elements fill numel() places of memory, each once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
