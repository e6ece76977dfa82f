"""Compile the kernels for a GPU that is not there: `python -m tests.compiled_kernels ARCHITECTURE...`.

The wrappers run as they do on a GPU, to the point where a kernel would be launched. One line of JSON for each
kernel that was compiled: the case that asked for it, its name, the architecture, the size in bytes, and the
instructions that are in it.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ringps.kernels.cuda.launch import kernels_everywhere
from tests.kernel_cases import CASES, Case, packed

COMPILED: dict[str, Case] = {
    "pack float32": partial(
        packed, sizes=(5000,), dtypes=(torch.float32,), flat_dtype=torch.float32, weights=(None, 0.5, 0.0)
    ),
    **{
        name: CASES[name]
        for name in (
            "pack float64 into bfloat16",
            "pack float16 into float32",
            "fold 17 inputs of float32",
            "fold mean of float64",
            "fold mean of bfloat16",
            "fold max of float16",
            "fold sum of int8",
            "fold unaligned",
            "digest small",
            "digest unaligned",
            "quantize 9001 of float32",
            "quantize 9001 of bfloat16",
        )
    },
}


class AbsentGpu:
    """What Triton asks of its driver before it launches anything."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def main(architectures: list[int]) -> None:
    run = triton.JITFunction.run
    seen: set[int] = set()
    case = ""

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            kept.append(kernel)
            ptx, size_bytes = kernel.asm["ptx"], len(kernel.asm["cubin"])
            instructions = sorted(set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+\.[\w.:]+)", ptx, re.M)))
            print(json.dumps([case, self.fn.__name__, architecture, size_bytes, instructions]), flush=True)

    kept: list[object] = []
    triton.JITFunction.run = compile_only
    for architecture in architectures:
        triton.runtime.driver.set_active(AbsentGpu(architecture))
        with kernels_everywhere():
            for case, compute in COMPILED.items():  # noqa: B007  `compile_only` reads it
                compute("cpu")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
