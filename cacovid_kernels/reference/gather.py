"""Gather of rows and its adjoint: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """[outer, N, inner] -> [outer, *index.shape, inner]: x at the index, zeros where it is outside [0, N)."""
    flat, n = index.reshape(-1), x.shape[dim]
    shape = x.shape[:dim] + index.shape + x.shape[dim + 1 :]
    bits = as_bits(x)
    if n == 0:
        return torch.zeros(shape, dtype=bits.dtype, device=x.device).view(x.dtype)
    rows = bits.index_select(dim, flat.clamp(0, n - 1))  # [outer, I, inner]
    outside = ((flat < 0) | (flat >= n)).reshape([-1] + [1] * (x.dim() - dim - 1))  # [I, 1...]
    return rows.masked_fill(outside, 0).view(x.dtype).reshape(shape)


def gather_rows(xs: list[Tensor], index: Tensor, dims: list[int]) -> list[Tensor]:
    return [_gather(x, index, dim) for x, dim in zip(xs, dims, strict=True)]


def gather_rows_out(xs: list[Tensor], index: Tensor, dims: list[int], outs: list[Tensor]) -> None:
    for out, x, dim in zip(outs, xs, dims, strict=True):
        out.copy_(_gather(x, index, dim))


def _scatter(grad: Tensor, index: Tensor, n: int, dim: int) -> Tensor:
    """[outer, *index.shape, inner] -> [outer, N, inner]: rows of a token summed in ascending position."""
    flat = index.reshape(-1)
    shape = (*grad.shape[:dim], flat.numel(), *grad.shape[dim + index.dim() :])  # [outer, I, inner]
    rows = grad.reshape(shape).movedim(dim, 0).to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    target = torch.where((flat < 0) | (flat >= n), n, flat)  # row n collects what is dropped
    sums = rows.new_zeros(n + 1, *rows.shape[1:])
    if grad.device.type == "cpu":
        sums.index_add_(0, target, rows)  # one after another in ascending position
    else:
        sums.index_put_((target,), rows, accumulate=True)  # sorts first: the same order every run
    return sums[:n].movedim(0, dim).to(grad.dtype).contiguous()


def scatter_rows(grads: list[Tensor], index: Tensor, sizes: list[int], dims: list[int]) -> list[Tensor]:
    return [_scatter(g, index, n, dim) for g, n, dim in zip(grads, sizes, dims, strict=True)]
