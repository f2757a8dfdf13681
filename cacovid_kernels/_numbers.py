"""Numbers that the host knows, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def numbers_on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`[n]` tensor of host integers, made by fills: a copy from the host would wait for the device and could not be
    captured in a CUDA graph."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return filled(device, numbers, dtype)


def filled(device: torch.device, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same by fills on every device."""
    runs = [(number, sum(1 for _ in run)) for number, run in groupby(numbers)]
    return torch.cat([torch.full((count,), number, dtype=dtype, device=device) for number, count in runs])
