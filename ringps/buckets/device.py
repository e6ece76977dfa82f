"""Buckets in the memory of a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringps.buckets.flat import FlatBucket, is_dense
from ringps.buckets.layout import Bucket
from ringps.buckets.ring import ReductionRing
from ringps.device import Accelerator, Stream
from ringps.kernels.cuda.pack import PackPlan


class DeviceBucket(FlatBucket):
    """A `FlatBucket` whose gradients are packed by one kernel, when the last of them has arrived.

    Gradients may come on several streams, as the forward pass had them; they are packed on that of the last,
    which waits for the others.
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        ring: ReductionRing,
        device: Accelerator,
    ) -> None:
        """As `FlatBucket`.

        Args:
            bucket: likewise.
            parameters: likewise.
            names: likewise.
            ring: likewise.
            device: what its parameters lie on.
        """
        self._streams: dict[int, Stream] = {}
        """On which gradients have arrived."""
        self._device = device
        super().__init__(bucket, parameters, names, ring)
        self._plan = PackPlan(
            [slot.stop - slot.start for slot in bucket.slots],
            [slot.start for slot in bucket.slots],
            self._input.dtype,
            self._input.device,
        )

    def load(self, position: int, weight: float | None) -> None:
        """Note that the gradient of slot `position` has arrived.

        Raises:
            ValueError: the gradient is sparse.
        """
        self._take(position)
        here = self._device.here()
        self._streams.setdefault(here.key, here)

    def reset(self) -> None:
        super().reset()
        self._streams = {}

    def _fill(self, weight: float | None) -> None:
        here = self._device.here()
        gradients = [parameter.grad for parameter, _, _ in self._views]
        others = [stream for key, stream in self._streams.items() if key != here.key]
        for stream in others:
            here.after(stream.mark())
        if others:
            for gradient in gradients:
                if gradient is not None:
                    here.keep(gradient)
        flat = [
            None if gradient is None else _flat(gradient, view)
            for gradient, (_, view, _) in zip(gradients, self._views, strict=True)
        ]
        self._plan.pack(flat, self._input, weight)


def _flat(gradient: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The gradient's elements in the order in which they lie in the bucket."""
    if gradient.stride() == view.stride() and is_dense(gradient):
        return gradient.as_strided((gradient.numel(),), (1,))
    arranged = torch.empty_strided(view.shape, view.stride(), dtype=gradient.dtype, device=gradient.device)
    return arranged.copy_(gradient).as_strided((gradient.numel(),), (1,))
