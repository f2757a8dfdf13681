"""Compaction of key and value caches: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits

ELSEWHERE, IN_HEADS, IN_FRONT = 0, 1, 2


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Columns j and j + half of [..., D] are a pair, turned by the angle of cos[..., j] and sin[..., j]."""
    half = cos.shape[-1]
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    a, b = wide[..., :half], wide[..., half : 2 * half]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(rows.dtype)
    return torch.cat([turned, rows[..., 2 * half :]], -1)


def _kept_rows(x: Tensor, keep: Tensor, cu_seqlens: Tensor | None, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, H, N, D] -> [B, H, K, D], or [total, D] with cu_seqlens; zeros where a position is outside [0, N)."""
    b, h, n, _ = x.shape
    outside = ((keep < 0) | (keep >= n))[..., None]  # [b, h, K, 1] or [total, 1]
    if n == 0:
        rows = x.new_zeros((*keep.shape, x.shape[3]))
        rows = rows if cu_seqlens is not None else rows.expand(b, h, -1, -1)
    else:
        inside = keep.clamp(0, n - 1)
        if cu_seqlens is None:
            batch = torch.arange(b, device=x.device)[:, None, None]
            head = torch.arange(h, device=x.device)[None, :, None]
        else:
            entries = torch.arange(keep.numel(), device=x.device)
            s = torch.searchsorted(cu_seqlens[1:].long(), entries, right=True)
            batch, head = s // h, s % h
        rows = as_bits(x)[batch, head, inside].view(x.dtype)
    if table is not None:
        rows = rotate(rows, *table)
    return as_bits(rows).masked_fill(outside, 0).view(x.dtype)


def repack_rows(
    xs: list[Tensor],
    keep: list[Tensor],
    cu_seqlens: list[Tensor],
    keep_of: list[int],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: list[bool],
) -> list[Tensor]:
    """keep[j] is [b, h, K], or [total] with cu_seqlens[j]; xs[i] uses keep[keep_of[i]] and is turned if rotated."""
    return [
        _kept_rows(x, keep[j], cu_seqlens[j] if cu_seqlens else None, (cos[j], sin[j]) if turn else None)
        for x, j, turn in zip(xs, keep_of, rotated, strict=True)
    ]


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
    """The same rows written over xs: IN_HEADS to the front of every head, IN_FRONT to the front of the tensor."""
    for x, j, turn, placement in zip(xs, keep_of, rotated, placements, strict=True):
        table = (cos[j], sin[j]) if turn else None
        rows = _kept_rows(x, keep[j], cu_seqlens[j] if cu_seqlens else None, table)
        if placement == IN_FRONT:
            as_bits(x).view(-1)[: rows.numel()] = as_bits(rows).reshape(-1)
            continue
        as_bits(x)[:, :, : rows.shape[2]] = as_bits(rows)
        if zero_tail:
            as_bits(x)[:, :, rows.shape[2] :] = 0
