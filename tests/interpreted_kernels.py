"""Run the kernels in Triton's interpreter, on the CPU: `python -m tests.interpreted_kernels`.

One line of JSON for each case: its name, and whether kernel and reference agree, or what was raised.
A process of its own, since Triton looks at TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import os
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ringps.kernels.cuda.launch import kernels_everywhere
from tests.kernel_cases import CASES, same

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """The interpreter cuts off what bfloat16 has no room for, where a GPU rounds half to even."""
    pair = (source.dtype.scalar, target.scalar)
    if pair == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.atleast_1d(source.data).copy()).to(torch.bfloat16)
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return _cast(self, source, target)


def main() -> None:
    InterpreterBuilder.cast_impl = _rounding_cast
    np.seterr(all="ignore")
    for name, case in CASES.items():
        try:
            expected = case("cpu")
            with kernels_everywhere():
                found = case("cpu")
            outcome = "same" if same(found, expected) else "the kernel's bits differ from the reference's"
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)


if __name__ == "__main__":
    main()
