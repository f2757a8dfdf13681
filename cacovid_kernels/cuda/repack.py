"""Compaction of key and value caches as one CUDA launch for all tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.cuda import kernels, queue_of
from cacovid_kernels.reference.repack import ELSEWHERE


def repack_rows(
    xs: list[Tensor],
    keep: list[Tensor],
    cu_seqlens: list[Tensor],
    keep_of: list[int],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: list[bool],
) -> list[Tensor]:
    outs = []
    for x, j in zip(xs, keep_of, strict=True):
        kept = keep[j].shape
        shape = (kept[0], x.shape[3]) if cu_seqlens else (x.shape[0], x.shape[1], kept[2], x.shape[3])
        outs.append(torch.empty(shape, dtype=x.dtype, device=x.device))
    _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, [ELSEWHERE] * len(xs), False, outs)
    return outs


def repack_rows_(
    xs: list[Tensor],
    keep: list[Tensor],
    cu_seqlens: list[Tensor],
    keep_of: list[int],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: list[bool],
    placements: list[int],
    zero_tail: bool,
) -> None:
    _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, [])


def _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, outs) -> None:
    if not xs:
        return
    kernels().repack_rows(
        [as_bits(x) for x in xs], [k.contiguous() for k in keep], cu_seqlens, keep_of, cos, sin, rotated, placements,
        zero_tail, [as_bits(out) for out in outs], *queue_of(xs[0].device),
    )  # fmt: skip
