"""The memory of one bucket: gradients in, reduced gradients out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringps.buckets.layout import Bucket
from ringps.buckets.ring import PendingReduction, ReductionRing


class FlatBucket:
    """An input and an output tensor, and every parameter's views of them.

    `load` copies the gradients to the input, which stays as it is until the next `load`; `launch`
    reduces it to the output; `publish` makes the parameters' `.grad` views of the output.
    """

    def __init__(
        self, bucket: Bucket, parameters: Sequence[torch.nn.Parameter], names: Sequence[str]
    ) -> None:
        """
        Args:
            bucket: its plan; `bucket.slots` index `parameters` and `names`.
            parameters: all parameters of the layout, on the CPU.
            names: for messages.
        """
        dtype = parameters[bucket.slots[0].parameter].dtype
        self._input = torch.zeros(bucket.numel, dtype=dtype)
        self._output = torch.zeros(bucket.numel, dtype=dtype)
        self._input_flags = self._input[bucket.flags_start :]
        self._output_flags = self._output[bucket.flags_start :]
        self._names = [names[slot.parameter] for slot in bucket.slots]
        self._views = [
            (parameter, _like(parameter, self._input, slot.start), _like(parameter, self._output, slot.start))
            for slot in bucket.slots
            for parameter in (parameters[slot.parameter],)
        ]

    @property
    def input_bytes(self) -> int:
        """Size of the tensor that travels."""
        return self._input.nbytes

    @torch.no_grad()
    def load(self, weight: float | None, rank_flag: bool) -> None:
        """Copy every `.grad`, times `weight`, to the input; zeros where there is none.

        Raises:
            ValueError: a gradient is sparse.
        """
        flags = [True] * len(self._views)
        for position, (parameter, view, _) in enumerate(self._views):
            gradient = parameter.grad
            if gradient is None:
                flags[position] = False
                view.zero_()
            elif gradient.layout is not torch.strided:
                raise ValueError(
                    f'the gradient of "{self._names[position]}" is sparse, and ringps reduces dense '
                    "gradients only; construct its layer with sparse=False"
                )
            elif weight is None:
                view.copy_(gradient)
            else:
                torch.mul(gradient, weight, out=view)
        self._input_flags.copy_(torch.tensor([*flags, rank_flag]))

    def launch(self, ring: ReductionRing, op: str, label: str) -> PendingReduction:
        """Start the reduction of the input to the output."""
        return ring.all_reduce_into(self._output, self._input, op, label=label)

    def publish(self) -> bool:
        """Let every `.grad` be the reduced one, or None if no rank has one.

        Returns:
            Whether any rank had raised its flag.
        """
        *present, rank_flag = self._output_flags.tolist()
        for flag, (parameter, _, view) in zip(present, self._views, strict=True):
            wanted = view if flag else None
            if parameter.grad is not wanted:
                parameter.grad = wanted
        return bool(rank_flag)

    @torch.no_grad()
    def adopt(self, ring: ReductionRing, src: int) -> None:
        """Let every `.grad` be what it is at rank `src` now."""
        flags = [parameter.grad is not None for parameter, _, _ in self._views]
        for parameter, _, view in self._views:
            if parameter.grad is not None and parameter.grad is not view:
                view.copy_(parameter.grad)
        self._output_flags.copy_(torch.tensor([*flags, False]))
        ring.broadcast(self._output, src)
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
