"""Fresh memory for many results at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine

_HUGE_PAGE = 2 << 20
_TOGETHER = 8 << 20  # bytes from which page faults, 0.3 ms per MiB, outweigh a copy
_ALIGNMENT = 64


def empty_tensors(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Uninitialised tensors. Many that are large together, but none alone, get parts of one block of huge pages:
    a storage each, the block is freed with the last of them."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    if len(sizes) < 2 or sum(sizes) < _TOGETHER or max(sizes) >= 2 * _HUGE_PAGE:
        return [torch.empty(shape, dtype=dtype, device=CPU) for shape, dtype in zip(shapes, dtypes, strict=True)]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    pages = -(-sum(padded) // _HUGE_PAGE) + 1
    block = torch.empty(pages * _HUGE_PAGE, dtype=torch.uint8, device=CPU)
    engine().expect_writes(block)
    storage, at = block.untyped_storage(), -block.data_ptr() % _HUGE_PAGE
    outs = []
    for shape, dtype, size, step in zip(shapes, dtypes, sizes, padded, strict=True):
        part = torch.empty(0, dtype=dtype, device=CPU)
        outs.append(part.set_(storage[at : at + size], 0, tuple(shape)))  # type: ignore[call-overload]
        at += step
    return outs
