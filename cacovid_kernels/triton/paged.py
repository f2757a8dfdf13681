"""Compaction of paged key and value caches as one Triton launch for all tensors of one shape."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.page_move import PageGeometry, page_kernel
from cacovid_kernels.triton.repack import (
    COLUMNS,
    ELEMENTS_TURNED,
    PIECE,
    POINTERS,
    PROGRAMS,
    VECTORS,
    VECTORS_IN_PLACE,
    list_steps,
    row_width,
)  # fmt: skip
from cacovid_kernels.triton.storage import KINDS
from cacovid_kernels.triton.words import seal, width_of

ENTRIES = 1024  # of a table that a program takes at a time


def repack_pages(
    pages: list[Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    keep: list[Tensor],
    keep_of: list[int],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: list[bool],
    out_block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, width = block_table.shape
    keep = [k.contiguous() for k in keep]
    shapes = ((b, -(-keep[0].shape[2] // pages[0].shape[1])), (b,), (b, width), (b,))
    outs = [torch.empty(shape, dtype=torch.int32, device=seq_lens.device) for shape in shapes]
    tables = [block_table, seq_lens, block_table if out_block_table is None else out_block_table, *outs]
    status = torch.zeros_like(seq_lens)  # programs add what they see
    tables.append(status)

    fold = not any(rotated) and all(k.shape[1] == 1 for k in keep)
    xs = [_folded(as_bits(x)) if fold else as_bits(x) for x in pages]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (x, j) in enumerate(zip(xs, keep_of, strict=True)):
        angles = cos[j].shape if cos else None
        groups[x.dtype, x.shape, x.stride(), keep[j].shape, angles, row_width(x, x)].append(i)
    sequences = b  # whose tables are still to be made: the first launch does
    for (*_, row_bytes), members in groups.items():
        members.sort(key=lambda i: not rotated[i])  # those that are turned come first
        lists = {keep_of[i] for i in members}
        per_list = 1 + 2 * rotated[members[0]]
        per_tensor = 1 + (per_list if len(lists) > 1 else 0)
        size = (POINTERS - per_list - len(tables) - 1) // per_tensor
        for at in range(0, len(members), size):
            some = members[at : at + size]
            used = [keep_of[some[0]]] if len(lists) == 1 else [keep_of[i] for i in some]
            _move(
                [xs[i] for i in some], [keep[j] for j in used], [cos[j] for j in used] if cos else [],
                [sin[j] for j in used] if sin else [], sum(rotated[i] for i in some), keep[0], tables,
                out_block_table is None, sequences, row_bytes,
            )  # fmt: skip
            sequences = 0
    table, lengths, freed, num_freed = outs
    return table, lengths, freed, num_freed, status


def _folded(x: Tensor) -> Tensor:
    """Heads that keep the same rows and lie side by side are one long row."""
    blocks, size, heads, columns = x.shape
    if x.stride(3) != 1 or x.stride(2) != columns:
        return x
    return x.as_strided((blocks, size, 1, heads * columns), (x.stride(0), x.stride(1), heads * columns, 1))


def _move(
    xs: list[Tensor],
    keep: list[Tensor],
    cos: list[Tensor],
    sin: list[Tensor],
    rotated: int,
    counted: Tensor,
    tables: list[Tensor],
    in_place: bool,
    sequences: int,
    width: int,
) -> None:
    """One launch for tensors of one shape: the first `rotated` of them are turned."""
    (blocks, block_size, heads, columns), item = xs[0].shape, xs[0].element_size()
    batch, rows, half = tables[0].shape[0], keep[0].shape[2], cos[0].shape[3] if rotated else 0
    if rotated:
        width = math.gcd(width, half * item) if width_of([*cos, *sin]) == 16 else item
    vector = width // item  # elements that one access moves

    tile_columns = min(block(columns, vector), COLUMNS * vector)
    if rotated:
        tile_columns = max(tile_columns, 2 * block(half, vector))
    elif in_place:
        walks = len(xs) * batch * heads
        while tile_columns > max(PIECE // item, vector) and walks * -(-columns // tile_columns) < PROGRAMS:
            tile_columns //= 2
    num_warps, each = 4, vector * (VECTORS if width == 16 and not in_place else VECTORS_IN_PLACE)
    if rotated and vector > 1:
        num_warps, each = 8 if in_place else 4, ELEMENTS_TURNED
    tile_rows = max(32 * num_warps * each // tile_columns, 1)
    column_tiles = -(-columns // tile_columns)
    if rotated:
        column_tiles = max(column_tiles, 1 + -(-(columns - 2 * half) // tile_columns))

    tiles = -(-rows // tile_rows)
    all_units = batch * heads * tiles
    units = tiles if in_place else 1
    block_step, slot_step, head_step, column_step = xs[0].stride()
    keep_steps = list_steps(keep[0])
    table_steps = list_steps(cos[0]) if rotated else (0, 0)
    numbers = PageGeometry(
        sequences=sequences, rows=rows, tiles=tiles, units=units, parts=all_units // units, column_tiles=column_tiles,
        heads=heads, blocks=blocks, block_size=block_size, width=tables[0].shape[1], out_width=tables[2].shape[1],
        new_width=tables[3].shape[1], block_step=block_step // vector, slot_step=slot_step // vector,
        head_step=head_step // vector, column_step=column_step, count_step=list_steps(counted)[0],
        keep_batch_step=keep_steps[0], keep_head_step=keep_steps[1], table_batch_step=table_steps[0],
        table_head_step=table_steps[1], columns=columns // vector, half=half // vector, rotated=rotated,
    )  # fmt: skip
    g = PageGeometry(*map(seal, numbers))
    cos, sin = (cos, sin) if rotated else (keep[:1], keep[:1])
    launch(
        page_kernel, (sequences + len(xs) * column_tiles * (all_units // units),), tuple(xs), tuple(keep), tuple(cos),
        tuple(sin), counted, *tables, g, IN_PLACE=in_place, TURNED=rotated > 0,
        KIND=KINDS[xs[0].dtype] if rotated else 0, ITEM=item, VECTOR=vector,
        APART=columns > 1 and xs[0].stride(3) != 1, ROWS=tile_rows, COLUMNS=tile_columns, BLOCK=ENTRIES,
        num_warps=num_warps,
        maxnreg=255 if rotated or len(keep) > 1 else None,  # left alone, ptxas spills some of these
    )  # fmt: skip
