"""Arithmetic with one answer on every backend: the torch twin of `csrc/include/cacovid/exact.h` and `order.h`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TAYLOR = [1 / math.factorial(n) for n in range(13, -1, -1)]


def exp_exact(x: Tensor) -> Tensor:
    """e^x for float64 x <= 0 from add, multiply and bit casts only; 0 below -700."""
    tiny = ~(x >= -700.0)
    x = torch.where(tiny, 0.0, x)
    n = torch.round(x * 1.4426950408889634)
    r = x - n * 0.693147180369123816490
    r = r - n * 1.90821492927058770002e-10
    p = torch.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        p = p * r + coefficient
    scale = ((n.long() + 1023) << 52).view(torch.float64)
    return torch.where(tiny, 0.0, p * scale)


def to_fixed(x: Tensor) -> Tensor:
    """float64 to int64 with 40 fractional bits: sums have the same bits in every order."""
    return torch.round(x * 2.0**40).long()


def from_fixed(x: Tensor) -> Tensor:
    """The float64 that a fixed-point integer stands for."""
    return x.double() * 2.0**-40


def order_key(scores: Tensor) -> Tensor:
    """int64 in [0, 2^32), larger = ranked earlier: finite by value (-0 = +0), then -inf, then every NaN as 0."""
    bits = scores.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    bits = torch.where(bits == 0x80000000, 0, bits)  # -0; adding 0 instead may flush subnormal scores to zero
    key = torch.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return torch.where(torch.isnan(scores), 0, key)


def ranking(scores: Tensor) -> Tensor:
    """`[..., P]` scores to the positions from first to last place, the lower position first among equals."""
    return torch.sort(order_key(scores), dim=-1, descending=True, stable=True).indices
