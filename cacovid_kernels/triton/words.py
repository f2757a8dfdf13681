"""What kernels that move bits have to know of memory, and numbers in tuples of arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_SEAL = 1 << 62


def width_of(xs: Iterable[Tensor], *bytes_between: int) -> int:
    """Bytes of the widest vector, at most 16, that rows of `xs` are made of which lie that many bytes apart."""
    return math.gcd(16, *(x.data_ptr() for x in xs), *bytes_between)


def flat_index(index: Tensor) -> Tensor:
    """`index` as contiguous int64 [I]."""
    return index.reshape(-1).to(torch.int64).contiguous()


def seal(n: int) -> int:
    """A number in [0, 2^61) for a tuple argument, which a kernel opens with `storage.number`.

    Triton compiles a kernel anew for what it sees in a tuple's integers: whether one is 1, divides by 16, fits
    32 bits. Sealed ones are all odd and wide.
    """
    return _SEAL | 2 * n + 1
