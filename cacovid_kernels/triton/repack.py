"""Compaction of key and value caches as one Triton launch for all tensors of one shape."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.reference.repack import ELSEWHERE, IN_FRONT, IN_HEADS
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.move import Geometry, move_kernel
from cacovid_kernels.triton.storage import KINDS
from cacovid_kernels.triton.words import seal, width_of

# Vectors of a row in one tile: 1 KiB. And what a thread moves at a time: enough loads in flight, in place too, where a
# program has only one tile on its way; elements where keys are turned, which takes registers.
COLUMNS, VECTORS, VECTORS_IN_PLACE, ELEMENTS_TURNED = 64, 4, 8, 16
# In place a program walks through its rows, and rows are split between programs until there are enough of them for a
# GPU, but not into pieces that memory fetches twice.
PROGRAMS, PIECE = 400, 64
POINTERS = 448  # of one launch: a kernel takes 4 KiB of arguments


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
    for x, j in zip(xs, keep_of, strict=True):
        if cu_seqlens and keep[j].shape[0] > x.shape[0] * x.shape[1] * x.shape[2]:
            raise ValueError("in place at most N rows of every head can be kept")
    _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, xs)


def _repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, zero_tail, outs) -> None:
    """`outs` are `xs` where rows stay in them."""
    xs, outs, keep = [as_bits(x) for x in xs], [as_bits(x) for x in outs], [k.contiguous() for k in keep]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (x, j) in enumerate(zip(xs, keep_of, strict=True)):
        if outs[i].numel() > 0:
            table = cos[j].shape if cos else None
            key = (x.dtype, x.shape, x.stride(), placements[i], keep[j].shape, table, row_width(x, outs[i]))
            groups[key].append(i)
    for (*_, width), members in groups.items():
        members.sort(key=lambda i: not rotated[i])  # those that are turned come first
        lists = {keep_of[i] for i in members}
        per_list = 1 + bool(cu_seqlens) + 2 * rotated[members[0]]
        per_tensor = 1 + (placements[members[0]] == ELSEWHERE) + (per_list if len(lists) > 1 else 0)
        size = (POINTERS - per_list) // per_tensor
        for at in range(0, len(members), size):
            some = members[at : at + size]
            used = [keep_of[some[0]]] if len(lists) == 1 else [keep_of[i] for i in some]
            _move(
                [xs[i] for i in some], [outs[i] for i in some], [keep[j] for j in used],
                [cu_seqlens[j] for j in used] if cu_seqlens else [],
                [cos[j] for j in used] if cos else [], [sin[j] for j in used] if sin else [],
                sum(rotated[i] for i in some), placements[some[0]], zero_tail, width,
            )  # fmt: skip


def row_width(x: Tensor, out: Tensor) -> int:
    """The widest vector that rows of both are made of."""
    item, (*steps, column_step) = x.element_size(), x.stride()
    columns = x.shape[3]
    if columns > 1 and column_step != 1:
        return item
    return width_of([x, out], columns * item, *(step * item for step in steps))


def list_steps(x: Tensor) -> tuple[int, int]:
    """From row to row of the batch and from head to head, in lists: 0 along an axis that is shared."""
    return (x.shape[1] if x.shape[0] > 1 else 0), (1 if x.shape[1] > 1 else 0)


def _move(
    xs: list[Tensor],
    outs: list[Tensor],
    keep: list[Tensor],
    bounds: list[Tensor],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: int,
    placement: int,
    zero_tail: bool,
    width: int,
) -> None:
    """One launch for tensors of one shape: the first `rotated` of them are turned."""
    (batch, heads, tokens, columns), item, ragged = xs[0].shape, xs[0].element_size(), bool(bounds)
    half = cos[0].shape[-1] if rotated else 0
    if rotated:
        width = math.gcd(width, half * item) if width_of([*cos, *sin]) == 16 else item
    vector = width // item  # elements that one access moves
    apart = columns > 1 and xs[0].stride(3) != 1
    rows = keep[0].shape[-1]
    in_place = placement != ELSEWHERE

    pair = 2 if rotated else 1
    tile_columns = min(block(columns, pair * vector), COLUMNS * vector)
    if in_place:
        least = max(PIECE // item, vector) * pair
        walks = len(xs) * (batch * heads if placement == IN_HEADS else 1)
        while tile_columns > least and walks * -(-columns // tile_columns) < PROGRAMS:
            tile_columns //= 2
    num_warps, each = 4, vector * (VECTORS if width == 16 and not in_place else VECTORS_IN_PLACE)
    if rotated and vector > 1:
        num_warps, each = 8 if in_place else 4, ELEMENTS_TURNED
    tile_rows = max(32 * num_warps * each // tile_columns, 1)
    column_tiles = -(-columns // tile_columns)
    if rotated:
        pair_tiles = -(-half // (tile_columns // 2))
        column_tiles = max(column_tiles, pair_tiles - (-(columns - 2 * half) // tile_columns))

    tiles = max(-(-rows // tile_rows), 1)
    all_units = tiles if ragged else batch * heads * tiles
    units = {ELSEWHERE: 1, IN_HEADS: tiles, IN_FRONT: all_units}[placement]
    batch_step, head_step, row_step, column_step = xs[0].stride()
    keep_steps = (0, 0) if ragged else list_steps(keep[0])
    table_steps = (0, 0) if ragged or not rotated else list_steps(cos[0])
    tail = tokens - rows if zero_tail and placement == IN_HEADS else 0
    numbers = Geometry(
        rows=rows, tiles=tiles, units=units, parts=all_units // units, column_tiles=column_tiles, batch=batch,
        heads=heads, tokens=tokens, batch_step=batch_step // vector, head_step=head_step // vector,
        row_step=row_step // vector, column_step=column_step, keep_batch_step=keep_steps[0],
        keep_head_step=keep_steps[1], table_batch_step=table_steps[0], table_head_step=table_steps[1],
        columns=columns // vector, half=half // vector, rotated=rotated, tail=tail,
    )  # fmt: skip
    g = Geometry(*map(seal, numbers))
    cos, sin = (cos, sin) if rotated else (keep[:1], keep[:1])
    launch(
        move_kernel, (len(xs) * column_tiles * (all_units // units),), tuple(xs), tuple(xs[:1] if in_place else outs),
        tuple(keep), tuple(bounds or keep[:1]), tuple(cos), tuple(sin), g, PLACEMENT=placement, RAGGED=ragged,
        TURNED=rotated > 0, KIND=KINDS[xs[0].dtype] if rotated else 0, ITEM=item, VECTOR=vector, APART=apart,
        ROWS=tile_rows, COLUMNS=tile_columns, TAIL=tail > 0, num_warps=num_warps,
        maxnreg=255 if rotated else None,  # left alone, ptxas spills some of these for more programs at a time
    )  # fmt: skip
