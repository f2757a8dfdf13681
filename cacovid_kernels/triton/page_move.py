"""The kernel that moves the kept rows of a paged cache: many tensors in one launch, and their tables with them.

A unit is a block of ROWS kept rows of one head of one sequence. In place a program moves all units of a head one after
another, for columns that no other program touches; no row is overwritten before it is read, for the reasons that
`move.py` gives: row i of a sequence comes from row i or from behind it, and blocks that are written belong to one
sequence. Elsewhere every unit is a program of its own.

Tables that name a block twice move wrong rows, and ids out of range none, but no access leaves the cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from cacovid_kernels.triton.move import spread
from cacovid_kernels.triton.storage import FP32, narrow, number, number32, pick, widen

OUT_OF_BOUNDS = tl.constexpr(8)  # of Status


class PageGeometry(NamedTuple):
    """What the tensors of one launch share. Steps, columns and half count vectors of VECTOR elements; all sealed."""

    sequences: int  # whose tables this launch makes
    rows: int  # kept per head
    tiles: int  # units that hold them
    units: int  # of one program
    parts: int  # programs of one tensor and column tile
    column_tiles: int
    heads: int
    blocks: int
    block_size: int
    width: int  # entries of a sequence in the block table
    out_width: int
    new_width: int
    block_step: int
    slot_step: int
    head_step: int
    column_step: int
    count_step: int  # from sequence to sequence in the list that is counted, in lists of `rows`
    keep_batch_step: int  # in lists of `rows` positions
    keep_head_step: int
    table_batch_step: int
    table_head_step: int
    columns: int
    half: int
    rotated: int  # tensors before this one are turned


@triton.jit
def _blocks_of(rows, g):
    """Blocks that hold so many rows."""
    return (rows + number(g.block_size) - 1) // number(g.block_size)


@triton.jit
def _account(b, counted, block_table, seq_lens, out_table, new_table, new_lens, freed, num_freed, g,
             IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The tables of sequence b after the move."""
    lane, rows, width = tl.arange(0, BLOCK), number(g.rows), number(g.width)
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        i_row = start + lane
        position = tl.load(counted + b * number(g.count_step) * rows + i_row, mask=i_row < rows, other=-1)
        kept += (position != -1).to(tl.int32)
    length = tl.sum(kept, 0)
    used = _blocks_of(length.to(tl.int64), g)
    length_before = tl.load(seq_lens + b).to(tl.int64)
    used_before = tl.minimum(_blocks_of(tl.where(length_before > 0, length_before, 0), g), width)
    if IN_PLACE:
        now, first = block_table + b * width, tl.minimum(used, used_before)
    else:
        now, first = out_table + b * number(g.out_width), used_before * 0
    new_width = number(g.new_width)
    for start in range(0, new_width, BLOCK):
        i_block = start + lane
        block = tl.load(now + i_block, mask=i_block < used, other=-1)
        tl.store(new_table + b * new_width + i_block, block, mask=i_block < new_width)
    for start in range(0, width, BLOCK):
        i_block = start + lane
        block = tl.load(block_table + b * width + first + i_block, mask=i_block < used_before - first, other=-1)
        tl.store(freed + b * width + i_block, block, mask=i_block < width)
    tl.store(new_lens + b, length)
    tl.store(num_freed + b, (used_before - first).to(tl.int32))


@triton.jit
def _rows_of(unit, last, g, keep, block_table, seq_lens, out_table, status, IN_PLACE: tl.constexpr, ROWS: tl.constexpr):
    """Of a unit's rows: offsets to read at, -1 for zeros; to write at, -1 for nowhere; which stay; rows of the tables.

    From unit `last` on there are none. Flags the sequence if a row or a block does not exist.
    """
    rows, heads, tiles, size = number32(g.rows), number32(g.heads), number32(g.tiles), number32(g.block_size)
    count = tl.where(unit < last, unit, 0).to(tl.int32)
    b, h = (count // tiles // heads).to(tl.int64), (count // tiles % heads).to(tl.int64)
    i_row = (count % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    to_row = i_row.to(tl.int32)
    o_keep = (b * number(g.keep_batch_step) + h * number(g.keep_head_step)) * number(g.rows) + i_row
    position = tl.load(keep + o_keep, mask=i_row < tl.where(unit < last, rows, 0), other=-1)

    length = tl.load(seq_lens + b).to(tl.int64)
    m_source = (position >= 0) & (position < length) & (position < number(g.width) * number(g.block_size))
    from_row = tl.where(m_source, position, 0).to(tl.int32)
    o_entry = b * number(g.width) + from_row // size
    from_block = tl.load(block_table + o_entry, mask=m_source, other=-1).to(tl.int64)
    reads = (from_block >= 0) & (from_block < number(g.blocks))

    m_target = position != -1
    o_entry = b * number(g.out_width) + to_row // size
    to_block = tl.load(out_table + o_entry, mask=m_target, other=-1).to(tl.int64)
    writes = (to_block >= 0) & (to_block < number(g.blocks))
    tl.atomic_or(status + b + tl.zeros_like(o_entry), OUT_OF_BOUNDS, mask=m_target & ~(reads & writes), sem="relaxed")

    o_head = h * number(g.head_step)
    o_source = from_block * number(g.block_step) + (from_row % size).to(tl.int64) * number(g.slot_step) + o_head
    o_target = to_block * number(g.block_step) + (to_row % size).to(tl.int64) * number(g.slot_step) + o_head
    rests = reads & (position == i_row) if IN_PLACE else reads & ~reads
    i_angle = (b * number(g.table_batch_step) + h * number(g.table_head_step)) * number(g.rows) + i_row
    return tl.where(reads, o_source, -1), tl.where(writes, o_target, -1), rests, i_angle


@triton.jit
def _copy_units(
    x, keep, block_table, seq_lens, out_table, status, first, last, column, g, IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_column = column + tl.arange(0, COLUMNS)
    m_column = (i_column // VECTOR < number(g.columns))[None, :]  # whole vectors of lanes: the compiler sees it
    o_column = spread(i_column, g, APART)
    o_source, o_target, rests, _ = _rows_of(
        first, last, g, keep, block_table, seq_lens, out_table, status, IN_PLACE, ROWS
    )
    for unit in range(first, last):
        written = (o_target >= 0) & ~rests
        m_read = (written & (o_source >= 0))[:, None] & m_column
        values = tl.load(x + (o_source * VECTOR)[:, None] + o_column, mask=m_read, other=0)
        at, m_written = x + (o_target * VECTOR)[:, None] + o_column, written[:, None] & m_column
        if IN_PLACE:
            o_source, o_target, rests, _ = _rows_of(
                unit + 1, last, g, keep, block_table, seq_lens, out_table, status, IN_PLACE, ROWS
            )
            tl.debug_barrier()
        tl.store(at, values, mask=m_written)


@triton.jit
def _turn_units(
    x, keep, block_table, seq_lens, out_table, status, cosine, sine, first, last, g, IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Columns j and j + half are a pair, turned by the angle of their row in the tables: products and sums rounded.

    One program has all pairs of a row, so that it knows whether any of them is turned.
    """
    half = number(g.half)
    i_low = tl.arange(0, PAIRS).to(tl.int64)
    o_low, o_high = spread(i_low, g, APART), spread(i_low + half * VECTOR, g, APART)
    m_column = (i_low // VECTOR < half)[None, :]
    o_source, o_target, rests, i_angle = _rows_of(
        first, last, g, keep, block_table, seq_lens, out_table, status, IN_PLACE, ROWS
    )
    for unit in range(first, last):
        written, row = o_target >= 0, x + (o_source * VECTOR)[:, None]
        m_read = (written & (o_source >= 0))[:, None] & m_column
        a = widen(tl.load(row + o_low, mask=m_read, other=0), KIND)
        b = widen(tl.load(row + o_high, mask=m_read, other=0), KIND)
        o_angle = (i_angle * half * VECTOR)[:, None] + i_low[None, :]
        cos = widen(tl.load(cosine + o_angle, mask=m_read, other=0), FP32)
        sin = widen(tl.load(sine + o_angle, mask=m_read, other=0), FP32)
        if IN_PLACE:
            turned = tl.max((m_read & ((cos != 1.0) | (sin != 0.0))).to(tl.int32), 1) > 0
            written = written & (turned | ~rests)
        cos, sin = cos.to(a.dtype), sin.to(a.dtype)
        low, high = narrow(a * cos - b * sin, KIND), narrow(b * cos + a * sin, KIND)
        row, m_written = x + (o_target * VECTOR)[:, None], written[:, None] & m_column
        if IN_PLACE:
            o_source, o_target, rests, i_angle = _rows_of(
                unit + 1, last, g, keep, block_table, seq_lens, out_table, status, IN_PLACE, ROWS
            )
            tl.debug_barrier()
        tl.store(row + o_low, low, mask=m_written)
        tl.store(row + o_high, high, mask=m_written)


@triton.jit
def page_kernel(
    pages, keeps, cosines, sines, counted, block_table, seq_lens, out_table, new_table, new_lens, freed, num_freed,
    status, g, IN_PLACE: tl.constexpr, TURNED: tl.constexpr, KIND: tl.constexpr, ITEM: tl.constexpr,
    VECTOR: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tuples hold one entry per tensor, or one for all; those not in use repeat others. g: `PageGeometry`.

    With TURNED the first column tile of rotated tensors is their COLUMNS / 2 pairs; the others follow.
    """
    p = tl.program_id(0)
    if p < number32(g.sequences):
        _account(
            p.to(tl.int64), counted, block_table, seq_lens, out_table, new_table, new_lens, freed, num_freed, g,
            IN_PLACE, BLOCK,
        )  # fmt: skip
    else:
        p -= number32(g.sequences)
        column_tiles, parts = number32(g.column_tiles), number32(g.parts)
        i_column, part, t = p % column_tiles, p // column_tiles % parts, p // column_tiles // parts
        first = part.to(tl.int64) * number(g.units)
        last = first + number(g.units)
        x, keep = pick(pages, t, ITEM, ITEM * VECTOR), pick(keeps, t, 8, 8)
        column = i_column.to(tl.int64) * COLUMNS
        if TURNED:
            turned = t < number32(g.rotated)
            if turned & (i_column == 0):
                FLOATS: tl.constexpr = 4 * VECTOR if VECTOR < 4 else 16
                _turn_units(
                    x, keep, block_table, seq_lens, out_table, status, pick(cosines, t, 4, FLOATS),
                    pick(sines, t, 4, FLOATS), first, last, g, IN_PLACE, VECTOR, APART, ROWS, COLUMNS // 2, KIND,
                )  # fmt: skip
            else:
                behind_pairs = 2 * number(g.half) * VECTOR + column - COLUMNS
                _copy_units(
                    x, keep, block_table, seq_lens, out_table, status, first, last,
                    tl.where(turned, behind_pairs, column), g, IN_PLACE, VECTOR, APART, ROWS, COLUMNS,
                )  # fmt: skip
        else:
            _copy_units(
                x, keep, block_table, seq_lens, out_table, status, first, last, column, g, IN_PLACE, VECTOR, APART,
                ROWS, COLUMNS,
            )  # fmt: skip
