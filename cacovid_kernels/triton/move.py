"""The kernel that moves the kept rows of a cache: many tensors in one launch, elsewhere or within their memory.

A unit is a block of ROWS kept rows of one head (of all heads for ragged lists). In place a program moves all units of
a head (IN_HEADS) or of a tensor (IN_FRONT) one after another, for columns that no other program touches. No row is
overwritten before it is read:

- Lists ascend without duplicates, so the row kept k-th lies at position k or behind it; with the rows of all heads
  counted through, row e of the result comes from row e of the tensor or from behind it, and sources ascend with e.
- So what a later unit reads lies behind everything that this unit writes.
- What this unit itself reads is in registers before its first store: that is what the barrier is for. The stores
  need none behind them, since later loads touch none of their rows.

Lists that break the rule move wrong rows, but all of them inside the tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from cacovid_kernels.triton.storage import FP32, narrow, number, number32, pick, widen

ELSEWHERE, IN_HEADS, IN_FRONT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Geometry(NamedTuple):
    """What the tensors of one launch share. Steps, columns and half count vectors of VECTOR elements; all sealed."""

    rows: int  # kept per head; of all heads for ragged lists
    tiles: int  # units that hold them
    units: int  # of one program
    parts: int  # programs of one tensor and column tile
    column_tiles: int
    batch: int
    heads: int
    tokens: int
    batch_step: int
    head_step: int
    row_step: int
    column_step: int
    keep_batch_step: int  # in lists of `rows` positions
    keep_head_step: int
    table_batch_step: int
    table_head_step: int
    columns: int
    half: int
    rotated: int  # tensors before this one are turned
    tail: int  # rows of a head that become zero behind the kept ones


@triton.jit
def _head_of(i_row, bounds, heads):
    """int32, the head s with bounds[s] <= i_row < bounds[s + 1], and in [0, heads) whatever the bounds hold."""
    low = tl.zeros_like(i_row).to(tl.int32)
    high = low + heads  # the answer is in [low, high)
    span = heads
    while span > 1:
        middle = (low + high) // 2
        behind = tl.load(bounds + middle.to(tl.int64), mask=middle < high, other=0) <= i_row
        low, high = tl.where(behind, middle, low), tl.where(behind, high, middle)
        span = (span + 1) // 2
    return low


@triton.jit
def _of_head(head, g, batch_step, head_step):
    """What belongs to a head in something that batch and heads step through."""
    heads = number32(g.heads)
    return (head // heads).to(tl.int64) * number(batch_step) + (head % heads).to(tl.int64) * number(head_step)


@triton.jit
def _sources(unit, last, g, keep, bounds, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the rows that a unit keeps, in vectors, -1 for rows of zeros. From unit `last` on nothing is read."""
    lane, rows, tiles = tl.arange(0, ROWS), number(g.rows), number32(g.tiles)
    count = tl.cast(unit, tl.int32)
    if RAGGED:
        i_row = unit * ROWS + lane
        head = _head_of(i_row, bounds, (number(g.batch) * number(g.heads)).to(tl.int32))
        o_keep = i_row
    else:
        i_row = (count % tiles).to(tl.int64) * ROWS + lane
        head = tl.where(unit < last, count // tiles, 0)
        o_keep = _of_head(head, g, g.keep_batch_step, g.keep_head_step) * rows + i_row
    position = tl.load(keep + o_keep, mask=i_row < tl.where(unit < last, rows, 0), other=-1)
    inside = (position >= 0) & (position < number(g.tokens))
    o_row = _of_head(head, g, g.batch_step, g.head_step) + tl.where(inside, position, 0) * number(g.row_step)
    return tl.where(inside, o_row, -1)


@triton.jit
def _targets(unit, g, PLACEMENT: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the rows that a unit writes, in vectors, which of them there are, and their rows in the tables."""
    lane, rows, tiles = tl.arange(0, ROWS), number(g.rows), number32(g.tiles)
    count = tl.cast(unit, tl.int32)
    if RAGGED:
        i_row = unit * ROWS + lane
        i_table = i_row
        o_row = i_row * number(g.columns)
    else:
        head = count // tiles
        i_row = (count % tiles).to(tl.int64) * ROWS + lane
        i_table = _of_head(head, g, g.table_batch_step, g.table_head_step) * rows + i_row
        if PLACEMENT == IN_HEADS:
            o_row = _of_head(head, g, g.batch_step, g.head_step) + i_row * number(g.row_step)
        else:
            o_row = (head.to(tl.int64) * rows + i_row) * number(g.columns)
    return o_row, i_row < rows, i_table


@triton.jit
def spread(column, g, APART: tl.constexpr):
    """Offsets of columns in elements."""
    if APART:
        return (column * number(g.column_step))[None, :]
    else:
        return column[None, :]


@triton.jit
def _zero_tail(base, head, o_column, m_column, g, VECTOR: tl.constexpr, ROWS: tl.constexpr):
    """Every thread is past its last load by now: the last unit's barrier saw to it."""
    o_head = _of_head(head, g, g.batch_step, g.head_step)
    first, tokens = number(g.rows), number(g.rows) + number(g.tail)
    for start in range(first, tokens, ROWS):
        i_row = start + tl.arange(0, ROWS)
        o_row = (o_head + i_row * number(g.row_step)) * VECTOR
        tl.store(base + o_row[:, None] + o_column, 0, mask=(i_row < tokens)[:, None] & m_column)


@triton.jit
def _copy_units(
    source, target, keep, bounds, first, last, column, g, PLACEMENT: tl.constexpr, RAGGED: tl.constexpr,
    VECTOR: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    i_column = column + tl.arange(0, COLUMNS)
    m_column = (i_column // VECTOR < number(g.columns))[None, :]  # whole vectors of lanes: the compiler sees it
    o_read = spread(i_column, g, APART)
    o_written = spread(i_column, g, APART and PLACEMENT == IN_HEADS)
    o_source = _sources(first, last, g, keep, bounds, RAGGED, ROWS)
    for unit in range(first, last):
        m_source = (o_source >= 0)[:, None] & m_column
        values = tl.load(source + (o_source * VECTOR)[:, None] + o_read, mask=m_source, other=0)
        o_target, m_target, _ = _targets(unit, g, PLACEMENT, RAGGED, ROWS)
        if PLACEMENT != ELSEWHERE:
            o_source = _sources(unit + 1, last, g, keep, bounds, RAGGED, ROWS)
            tl.debug_barrier()
        tl.store(target + (o_target * VECTOR)[:, None] + o_written, values, mask=m_target[:, None] & m_column)
    if TAIL:
        _zero_tail(target, first.to(tl.int32) // number32(g.tiles), o_written, m_column, g, VECTOR, ROWS)


@triton.jit
def _turn_units(
    source, target, keep, bounds, cosine, sine, first, last, column, g, PLACEMENT: tl.constexpr, RAGGED: tl.constexpr,
    VECTOR: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Columns j and j + half are a pair, turned by the angle of their row in the tables: products and sums rounded."""
    half = number(g.half)
    i_low = column + tl.arange(0, PAIRS)
    i_high = i_low + half * VECTOR
    m_column = (i_low // VECTOR < half)[None, :]
    o_source = _sources(first, last, g, keep, bounds, RAGGED, ROWS)
    for unit in range(first, last):
        row = source + (o_source * VECTOR)[:, None]
        m_source = (o_source >= 0)[:, None] & m_column
        a = widen(tl.load(row + spread(i_low, g, APART), mask=m_source, other=0), KIND)
        b = widen(tl.load(row + spread(i_high, g, APART), mask=m_source, other=0), KIND)
        o_target, m_target, i_table = _targets(unit, g, PLACEMENT, RAGGED, ROWS)
        o_table = (i_table * half * VECTOR)[:, None] + i_low[None, :]
        cos = widen(tl.load(cosine + o_table, mask=m_source, other=0), FP32).to(a.dtype)
        sin = widen(tl.load(sine + o_table, mask=m_source, other=0), FP32).to(a.dtype)
        low, high = narrow(a * cos - b * sin, KIND), narrow(b * cos + a * sin, KIND)
        if PLACEMENT != ELSEWHERE:
            o_source = _sources(unit + 1, last, g, keep, bounds, RAGGED, ROWS)
            tl.debug_barrier()
        row = target + (o_target * VECTOR)[:, None]
        m_target = m_target[:, None] & m_column
        tl.store(row + spread(i_low, g, APART and PLACEMENT == IN_HEADS), low, mask=m_target)
        tl.store(row + spread(i_high, g, APART and PLACEMENT == IN_HEADS), high, mask=m_target)
    if TAIL:
        head = first.to(tl.int32) // number32(g.tiles)
        _zero_tail(target, head, spread(i_low, g, APART), m_column, g, VECTOR, ROWS)
        _zero_tail(target, head, spread(i_high, g, APART), m_column, g, VECTOR, ROWS)


@triton.jit
def move_kernel(
    sources, targets, keeps, bounds, cosines, sines, g, PLACEMENT: tl.constexpr, RAGGED: tl.constexpr,
    TURNED: tl.constexpr, KIND: tl.constexpr, ITEM: tl.constexpr, VECTOR: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Tuples hold one entry per tensor, or one for all; `targets` and what is not in use repeat others. g: `Geometry`.

    With TURNED the columns of rotated tensors are taken COLUMNS / 2 pairs at a time, then the others COLUMNS at a time.
    """
    p = tl.program_id(0)
    column_tiles, parts = number32(g.column_tiles), number32(g.parts)
    i_column, part, t = p % column_tiles, p // column_tiles % parts, p // column_tiles // parts
    first = part.to(tl.int64) * number(g.units)
    last = first + number(g.units)
    source, keep = pick(sources, t, ITEM, ITEM * VECTOR), pick(keeps, t, 8, 8)
    target, cu_seqlens = source, keep
    if PLACEMENT == ELSEWHERE:
        target = pick(targets, t, ITEM, ITEM * VECTOR)
    if RAGGED:
        cu_seqlens = pick(bounds, t, 4, 4)
    column = i_column.to(tl.int64) * COLUMNS
    if TURNED:
        PAIRS: tl.constexpr = COLUMNS // 2
        pair_tiles = tl.cdiv(number(g.half) * VECTOR, PAIRS)
        turned = t < number32(g.rotated)
        if turned & (i_column < pair_tiles):
            FLOATS: tl.constexpr = 4 * VECTOR if VECTOR < 4 else 16
            _turn_units(
                source, target, keep, cu_seqlens, pick(cosines, t, 4, FLOATS), pick(sines, t, 4, FLOATS), first, last,
                i_column.to(tl.int64) * PAIRS, g, PLACEMENT, RAGGED, VECTOR, APART, ROWS, PAIRS, TAIL, KIND,
            )  # fmt: skip
        else:
            behind_pairs = 2 * number(g.half) * VECTOR + (i_column - pair_tiles) * COLUMNS
            column = tl.where(turned, behind_pairs, column)
            _copy_units(
                source, target, keep, cu_seqlens, first, last, column, g, PLACEMENT, RAGGED, VECTOR, APART, ROWS,
                COLUMNS, TAIL,
            )  # fmt: skip
    else:
        _copy_units(
            source, target, keep, cu_seqlens, first, last, column, g, PLACEMENT, RAGGED, VECTOR, APART, ROWS, COLUMNS,
            TAIL,
        )  # fmt: skip
