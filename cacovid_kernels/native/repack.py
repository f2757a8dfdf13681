"""Compaction of key and value caches on the CPU engine."""

from __future__ import annotations

from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.native import engine, num_threads
from cacovid_kernels.native._memory import empty_tensors


def repack_rows(
    xs: list[Tensor],
    keep: list[Tensor],
    cu_seqlens: list[Tensor],
    keep_of: list[int],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: list[bool],
) -> list[Tensor]:
    shapes = []
    for x, j in zip(xs, keep_of, strict=True):
        kept = keep[j].shape
        shapes.append((kept[0], x.shape[3]) if cu_seqlens else (x.shape[0], x.shape[1], kept[2], x.shape[3]))
    outs = empty_tensors(shapes, [x.dtype for x in xs])
    _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, [0] * len(xs), False, True, outs)
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
    _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, False, [])


def _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, fresh, outs) -> None:
    engine().repack_rows(
        [as_bits(x) for x in xs], [k.contiguous() for k in keep], cu_seqlens, keep_of, cos, sin, rotated,
        placements, zero_tail, fresh, num_threads(), [as_bits(out) for out in outs],
    )  # fmt: skip
