"""Storage bits of dtypes that most kernels do not know."""

from __future__ import annotations

import torch
from torch import Tensor

_KNOWN = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(x: Tensor) -> Tensor:
    """`x` itself, or where its dtype is rare (float8, wide unsigned) a view of it as integers."""
    return x if x.dtype in _KNOWN else x.view(_OF_SIZE[x.element_size()])
