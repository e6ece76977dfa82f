"""The dtypes of tensors that can be saved, by name."""

from __future__ import annotations

import torch

BY_NAME: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    # Quantized tensors have scales beside their bytes.
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.quint"))
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in BY_NAME.items()}
