"""Gather of rows as CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.cuda import kernels, queue_of
from cacovid_kernels.native.gather import flat_index


def gather_rows(xs: list[Tensor], index: Tensor, dims: list[int]) -> list[Tensor]:
    outs = []
    for x, dim in zip(xs, dims, strict=True):
        shape = x.shape[:dim] + index.shape + x.shape[dim + 1 :]
        outs.append(torch.empty(shape, dtype=x.dtype, device=x.device))
    _gather(xs, index, dims, outs)
    return outs


def gather_rows_out(xs: list[Tensor], index: Tensor, dims: list[int], outs: list[Tensor]) -> None:
    targets = [
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs
    ]
    _gather(xs, index, dims, targets)
    for out, target in zip(outs, targets, strict=True):
        if out is not target:
            out.copy_(target)


def _gather(xs: list[Tensor], index: Tensor, dims: list[int], outs: list[Tensor]) -> None:
    # A 0-d result is one element; the kernels know tensors of 1 to 8 dimensions.
    targets = [as_bits(out if out.dim() <= 8 and out.dim() else out.reshape(-1)) for out in outs]
    kernels().gather_rows([as_bits(x) for x in xs], flat_index(index), dims, targets, *queue_of(index.device))
