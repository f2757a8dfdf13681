"""Rows of memory as integers: bits are moved in the widest words that sizes, strides and addresses allow."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SEAL = 1 << 62


def width_of(xs: Iterable[Tensor], *counts: int) -> int:
    """The widest vector, at most 16 bytes, at whose multiples the rows of `xs` lie; `counts` are further bytes."""
    size = 16
    for x in xs:
        size = math.gcd(size, x.data_ptr(), x.storage_offset() * x.element_size())
    return math.gcd(size, *counts)


def words(x: Tensor, width: int) -> Tensor:
    """`x` as integers of `width` bytes: of 8 for a vector of 16, which two of them make."""
    dtype = WORDS[min(width, 8)]
    return x if x.dtype is dtype else x.view(dtype)


def flat_index(index: Tensor) -> Tensor:
    """`index` as contiguous int64 [I]."""
    return index.reshape(-1).to(torch.int64).contiguous()


def seal(n: int) -> int:
    """A number in [0, 2^61) for a tuple argument, which a kernel opens with `storage.number`.

    Triton compiles a kernel anew for what it sees in a tuple's integers: whether one is 1, divides by 16, fits
    32 bits. Sealed ones are all odd and wide.
    """
    return _SEAL | 2 * n + 1
