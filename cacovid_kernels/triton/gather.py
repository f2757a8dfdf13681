"""Gather of rows as a Triton kernel: up to 8 tensors of any dtypes, shapes and strides in one launch."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.scatter import scatter_rows
from cacovid_kernels.triton.storage import as_words, number
from cacovid_kernels.triton.words import flat_index, seal, width_of

__all__ = ["gather_rows", "gather_rows_out", "scatter_rows"]

TENSORS = 8  # of one launch: each has its own code in the kernel
AXES = 3  # besides the tokens and the columns; a tensor with more is made contiguous first
# Vectors of a row in one tile: 1 KiB, which divides most hidden sizes. And vectors of a program of 4 warps: four loads
# of 16 bytes in flight for every thread, or eight of less.
COLUMNS, TILE, TILE_NARROW = 64, 512, 1024


class Rows(NamedTuple):
    """One tensor. Steps and columns count vectors: as many elements, side by side, as one access can move."""

    source: Any
    target: Any
    first: int  # its programs are [first, last)
    last: int
    row_tiles: int
    column_tiles: int
    by_columns: int  # whether programs go through all rows before they go on to the next columns
    tokens: int
    step: int  # from token to token
    target_step: int
    columns: int
    column_step: int
    sizes: tuple  # of the other axes, the innermost first
    steps: tuple
    target_steps: tuple


@triton.jit
def _gather_tile(
    x, index, kept, p, ITEM: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AXES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Moves ROWS entries of the index and COLUMNS elements of each, as integers of ITEM bytes."""
    row_tiles, column_tiles = number(x.row_tiles).to(tl.int32), number(x.column_tiles).to(tl.int32)
    segment = p // (row_tiles * column_tiles)
    tile = p - segment * (row_tiles * column_tiles)
    o_source, o_target = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for a in tl.static_range(AXES):
        size = number(x.sizes[a]).to(tl.int32)
        i_axis = (segment % size).to(tl.int64)
        segment = segment // size
        o_source += i_axis * number(x.steps[a])
        o_target += i_axis * number(x.target_steps[a])
    by_columns = number(x.by_columns) != 0
    tiles = tl.where(by_columns, row_tiles, column_tiles)
    slow, fast = tile // tiles, tile % tiles
    i_row = tl.where(by_columns, fast, slow).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = tl.where(by_columns, slow, fast).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_row = i_row < kept
    token = tl.load(index + i_row, mask=m_row, other=-1)
    m_token = (token >= 0) & (token < number(x.tokens))
    m_column = (i_column // VECTOR < number(x.columns))[None, :]  # whole vectors of lanes: the compiler sees it
    o_source += tl.where(m_token, token, 0) * number(x.step)
    o_target += i_row * number(x.target_step)
    o_column = i_column
    if APART:
        o_column = i_column * number(x.column_step)
    m_source, m_target = m_token[:, None] & m_column, m_row[:, None] & m_column
    source, target = as_words(x.source, ITEM), as_words(x.target, ITEM)
    values = tl.load(source + (o_source * VECTOR)[:, None] + o_column[None, :], mask=m_source, other=0)
    tl.store(target + (o_target * VECTOR)[:, None] + i_column[None, :], values, mask=m_target)


@triton.jit(do_not_specialize=["kept"])
def gather_kernel(
    index, kept: tl.int64, tensors, ITEM: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AXES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """tensors: `Rows`. Their rows of the tokens at the index, zeros where it is outside [0, tokens)."""
    p = tl.program_id(0)
    for t in tl.static_range(len(tensors)):
        first, last = number(tensors[t].first).to(tl.int32), number(tensors[t].last).to(tl.int32)
        if (p >= first) & (p < last):
            _gather_tile(
                tensors[t], index, kept, p - first, ITEM[t], VECTOR[t], ROWS[t], COLUMNS[t], AXES[t], APART[t]
            )  # fmt: skip


class _Layout(NamedTuple):
    """A tensor in elements: axes besides tokens and columns as (size, step, step in the target), and the columns."""

    axes: list[tuple[int, int, int]]
    columns: int
    column_step: int


def _layout_of(x: Tensor, dim: int, kept: int) -> _Layout:
    sizes, steps = x.shape, x.stride()
    target_steps = [1] * x.dim()
    for d in range(x.dim() - 2, -1, -1):
        target_steps[d] = target_steps[d + 1] * (kept if d + 1 == dim else sizes[d + 1])
    last, columns, column_step = x.dim(), 1, 1  # the axes from `last` on are the columns
    while last > dim + 1 and (sizes[last - 1] == 1 or steps[last - 1] == columns):
        last -= 1
        columns *= sizes[last]
    if columns == 1 and last > dim + 1:
        last -= 1
        columns, column_step = sizes[last], steps[last]
    axes: list[tuple[int, int, int]] = []
    for d in range(last):
        if d == dim or sizes[d] == 1:
            continue
        axis = (sizes[d], steps[d], target_steps[d])
        if axes and axes[-1][1:] == (sizes[d] * steps[d], sizes[d] * target_steps[d]):
            axis = (axes.pop()[0] * sizes[d], steps[d], target_steps[d])
        axes.append(axis)
    return _Layout(axes, columns, column_step)


def _rows(x: Tensor, dim: int, kept: int, out: Tensor, first: int) -> tuple[Rows, int, tuple]:
    """A tensor of `gather_kernel` whose programs begin at `first`, where they end, and its constants."""
    layout = _layout_of(x, dim, kept)
    if len(layout.axes) > AXES:
        x = x.contiguous()
        layout = _layout_of(x, dim, kept)
    axes, columns, column_step = layout
    tokens, step, item = x.shape[dim], x.stride(dim), x.element_size()
    width = item
    if column_step == 1:
        width = width_of([x, out], *(n * item for n in (columns, step, *(s for _, s, _ in axes))))
    vector = width // item
    tile_columns = min(block(columns, vector), COLUMNS * vector)
    tile_rows = (TILE if width == 16 else TILE_NARROW) * vector // tile_columns
    row_tiles, column_tiles = triton.cdiv(kept, tile_rows), triton.cdiv(columns, tile_columns)
    last = first + row_tiles * column_tiles * math.prod(n for n, _, _ in axes)
    inner_first = axes[::-1]
    rows = Rows(
        source=x,
        target=out,
        first=seal(first),
        last=seal(last),
        row_tiles=seal(row_tiles),
        column_tiles=seal(column_tiles),
        by_columns=seal(kept > tokens),
        tokens=seal(tokens),
        step=seal(step // vector),
        target_step=seal(math.prod(x.shape[dim + 1 :]) // vector),
        columns=seal(columns // vector),
        column_step=seal(column_step),
        sizes=tuple(seal(n) for n, _, _ in inner_first),
        steps=tuple(seal(s // vector) for _, s, _ in inner_first),
        target_steps=tuple(seal(s // vector) for _, _, s in inner_first),
    )
    return rows, last, (item, vector, tile_rows, tile_columns, len(axes), column_step != 1)


def _gather(xs: list[Tensor], index: Tensor, dims: list[int], outs: list[Tensor]) -> None:
    """`outs` are contiguous."""
    flat = flat_index(index)
    some = [i for i, out in enumerate(outs) if out.numel() > 0]
    for at in range(0, len(some), TENSORS):
        tensors, constants, programs = [], [], 0
        for i in some[at : at + TENSORS]:
            rows, programs, constant = _rows(as_bits(xs[i]), dims[i], flat.numel(), as_bits(outs[i]), programs)
            tensors.append(rows)
            constants.append(constant)
        item, vector, rows_of, columns, axes, apart = zip(*constants, strict=True)
        launch(
            gather_kernel, (programs,), flat, flat.numel(), tuple(tensors), ITEM=item, VECTOR=vector, ROWS=rows_of,
            COLUMNS=columns, AXES=axes, APART=apart,
        )  # fmt: skip


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
