"""Gather of rows and its adjoint on the CPU engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.native import CPU, engine, num_threads
from cacovid_kernels.native._memory import empty_tensors


def flat_index(index: Tensor) -> Tensor:
    if index.dim() == 1 and index.dtype is torch.int64 and index.is_contiguous():
        return index
    return index.reshape(-1).to(torch.int64).contiguous()


def gather_rows(xs: list[Tensor], index: Tensor, dims: list[int]) -> list[Tensor]:
    shapes, kept = [], index.shape
    for x, dim in zip(xs, dims, strict=True):
        shape = list(x.shape)
        shape[dim : dim + 1] = kept
        shapes.append(shape)
    outs = empty_tensors(shapes, [x.dtype for x in xs])
    _gather(xs, index, dims, True, outs)
    return outs


def gather_rows_out(xs: list[Tensor], index: Tensor, dims: list[int], outs: list[Tensor]) -> None:
    targets = [out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=CPU) for out in outs]
    _gather(xs, index, dims, False, targets)
    for out, target in zip(outs, targets, strict=True):
        if out is not target:
            out.copy_(target)


def _gather(xs: list[Tensor], index: Tensor, dims: list[int], fresh: bool, outs: list[Tensor]) -> None:
    # A 0-d result is one element; the engine knows tensors of 1 to 8 dimensions.
    targets = [as_bits(out if out.dim() <= 8 and out.dim() else out.reshape(-1)) for out in outs]
    engine().gather_rows([as_bits(x) for x in xs], flat_index(index), dims, fresh, num_threads(), targets)


def scatter_rows(grads: list[Tensor], index: Tensor, sizes: list[int], dims: list[int]) -> list[Tensor]:
    shapes, outs = [], []
    for grad, size, dim in zip(grads, sizes, dims, strict=True):
        outer, inner = grad.shape[:dim], grad.shape[dim + index.dim() :]
        shapes += [math.prod(outer), size, math.prod(inner)]
        outs.append(torch.empty((*outer, size, *inner), dtype=grad.dtype, device=CPU))
    flat = [grad.contiguous().reshape(-1) for grad in grads]
    targets = [out.reshape(-1) for out in outs]
    engine().scatter_rows(flat, flat_index(index), shapes, True, num_threads(), targets)
    return outs
