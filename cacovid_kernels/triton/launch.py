"""How kernels are launched: the options every one of them needs, and the numbers its arguments are made of."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs `kernel` once for every point of `grid` on the device of its tensors; an empty grid runs nothing.

    Products and sums are never contracted: a fused multiply-add rounds once where the other backends round twice.
    """
    if all(grid):
        with _device_of(args):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


def _device_of(args: Any) -> Any:
    first = next(x for x in args if isinstance(x, (Tensor, tuple)))
    device = (first if isinstance(first, Tensor) else first[0]).device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def block(n: int, least: int = 16) -> int:
    """The smallest power of two that holds `n` elements."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def double_bits(x: float) -> int:
    """A float64 as the integer that carries it: kernels take real arguments as float32 only."""
    return struct.unpack("<q", struct.pack("<d", x))[0]
