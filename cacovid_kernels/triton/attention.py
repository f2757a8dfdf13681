"""Attention scores in two launches: the softmax's maximum and sum for every row, then weights added up for every key.

The keys are read twice and the products computed twice; nothing of the attention matrix is stored. Every key's weights
are added by one program, in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.exact import double_of
from cacovid_kernels.triton.launch import block, double_bits, launch


class Tile(NamedTuple):
    """What one step of a program multiplies: [rows, columns] by [columns, keys]."""

    rows: int
    keys: int
    columns: int


# The fewest rows that tensor cores take, and as many as pay for the keys' traffic; more would spill registers.
FEW, MANY = Tile(16, 64, 64), Tile(64, 64, 64)
FLOAT32_FEW, FLOAT32_MANY = Tile(16, 32, 32), Tile(32, 32, 32)
LIMITS = {"num_warps": 8, "num_stages": 2, "maxnreg": 255}  # left alone, ptxas spills some for more programs at a time
PART = 1024  # keys whose statistics one program finds, more where there would be more than PARTS of them
PARTS = 64
LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for a product of -inf that a row sees; -inf for what it does not


@triton.jit
def _rows_at(query, row_positions, i_head, i_row, rows, group, count, stride_head, stride_row, stride_position):
    """Pointers to the rows of a key head's queries, the last key that each sees, and which of them exist."""
    live = i_row < group * rows
    i_query, i_row = i_head * group + i_row // rows, i_row % rows
    last = tl.zeros(i_row.shape, tl.int64) + count
    if row_positions is not None:
        last = tl.load(row_positions + i_row * stride_position, mask=live, other=-1)
    return query + i_query * stride_head + i_row * stride_row, tl.where(live, last, -1)


@triton.jit
def _logits(
    at_row, at_key, last, i_key, mask, scale, columns, count, stride_query_column, stride_column, stride_mask,
    COLUMNS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """float32 [rows, keys]: scaled products, at least LOWEST or NaN; -inf where a row does not see a key."""
    m_key, m_row = i_key < count, last >= 0
    i_column = tl.arange(0, COLUMNS).to(tl.int64)
    total = tl.zeros([last.shape[0], KEYS], tl.float32)
    for o_column in range(0, columns, COLUMNS):
        at = o_column + i_column
        m_column = at < columns
        b_query = tl.load(
            at_row[:, None] + at[None, :] * stride_query_column, m_row[:, None] & m_column[None, :], other=0.0
        )
        b_key = tl.load(at_key[None, :] + at[:, None] * stride_column, m_column[:, None] & m_key[None, :], other=0.0)
        total = tl.dot(b_query, b_key, total, input_precision="ieee")
    if mask is not None:
        m_key = m_key & (tl.load(mask + i_key * stride_mask, mask=m_key, other=0) != 0)
    total = (total * scale).to(tl.float32)
    total = tl.where(total < LOWEST, LOWEST, total)
    return tl.where(m_key[None, :] & (i_key[None, :] <= last[:, None]), total, float("-inf"))


@triton.jit
def _exp_below(x, top):
    """e^(x - top); 0 where x is -inf, whatever top is."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - tl.where(top == float("-inf"), 0.0, top)))


@triton.jit(do_not_specialize=["rows", "group", "count", "parts", "part", "blocks", "scale_bits"])
def _statistics_kernel(
    query, keys, mask, row_positions, tops, sums, rows: tl.int64, group: tl.int64, heads: tl.int64, count: tl.int64,
    columns, parts: tl.int64, part: tl.int64, blocks: tl.int64, scale_bits: tl.int64, stride_query_batch: tl.int64,
    stride_query_head: tl.int64, stride_query_row: tl.int64, stride_query_column: tl.int64, stride_batch: tl.int64,
    stride_head: tl.int64, stride_key: tl.int64, stride_column: tl.int64, stride_mask_batch: tl.int64,
    stride_mask: tl.int64, stride_position_batch: tl.int64, stride_position: tl.int64,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i_part, i_block = program % parts, program // parts % blocks
    i_head, i_batch = program // parts // blocks % heads, program // parts // blocks // heads
    i_row = i_block * ROWS + tl.arange(0, ROWS)
    if row_positions is not None:
        row_positions += i_batch * stride_position_batch
    if mask is not None:
        mask += i_batch * stride_mask_batch
    at_row, last = _rows_at(
        query + i_batch * stride_query_batch, row_positions, i_head, i_row, rows, group, count, stride_query_head,
        stride_query_row, stride_position,
    )  # fmt: skip
    keys += i_batch * stride_batch + i_head * stride_head
    scale = double_of(scale_bits).to(tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for o_key in range(i_part * part, tl.minimum((i_part + 1) * part, count), KEYS):
        i_key = o_key + tl.arange(0, KEYS)
        logits = _logits(
            at_row, keys + i_key * stride_key, last, i_key, mask, scale, columns, count, stride_query_column,
            stride_column, stride_mask, COLUMNS, KEYS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * _exp_below(top, higher) + tl.sum(_exp_below(logits, higher[:, None]), 1)
        top = higher
    at = ((i_batch * heads + i_head) * parts + i_part) * group * rows + i_row
    tl.store(tops + at, top, mask=i_row < group * rows)
    tl.store(sums + at, total, mask=i_row < group * rows)


@triton.jit(do_not_specialize=["rows", "group", "count", "parts", "blocks", "scale_bits"])
def _scores_kernel(
    query, keys, mask, row_positions, tops, sums, scores, rows: tl.int64, group: tl.int64, heads: tl.int64,
    count: tl.int64, columns, parts: tl.int64, blocks: tl.int64, tiles: tl.int64, scale_bits: tl.int64,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_query_column: tl.int64, stride_batch: tl.int64, stride_head: tl.int64, stride_key: tl.int64,
    stride_column: tl.int64, stride_mask_batch: tl.int64, stride_mask: tl.int64, stride_position_batch: tl.int64,
    stride_position: tl.int64, PER_HEAD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    i_tile, i_out = tl.program_id(0).to(tl.int64) % tiles, tl.program_id(0).to(tl.int64) // tiles
    i_batch, first_head, some_heads = i_out, tl.zeros([], tl.int64), heads
    if PER_HEAD:
        i_batch, first_head, some_heads = i_out // heads, i_out % heads, heads // heads
    i_key, i_part = i_tile * KEYS + tl.arange(0, KEYS), tl.arange(0, PARTS)
    if row_positions is not None:
        row_positions += i_batch * stride_position_batch
    if mask is not None:
        mask += i_batch * stride_mask_batch
    scale = double_of(scale_bits).to(tl.float32)
    score, seeing = tl.zeros([KEYS], tl.float32), tl.zeros([ROWS], tl.int64)
    for step in range(some_heads * blocks):
        i_head, i_row = first_head + step // blocks, step % blocks * ROWS + tl.arange(0, ROWS)
        at_row, last = _rows_at(
            query + i_batch * stride_query_batch, row_positions, i_head, i_row, rows, group, count, stride_query_head,
            stride_query_row, stride_position,
        )  # fmt: skip
        at = ((i_batch * heads + i_head) * parts + i_part[None, :]) * group * rows + i_row[:, None]
        m_part = (i_part < parts)[None, :] & (i_row < group * rows)[:, None]
        b_top = tl.load(tops + at, mask=m_part, other=float("-inf"))
        b_sum = tl.load(sums + at, mask=m_part, other=0.0)
        top = tl.max(b_top, 1)
        total = tl.sum(b_sum * _exp_below(b_top, top[:, None]), 1)
        # A row of LOWEST alone has no softmax, a row of -inf alone sees nothing.
        total = tl.where(top == LOWEST, float("nan"), total)
        blind = (top == float("-inf")) & (total == 0.0)
        logits = _logits(
            at_row, keys + i_batch * stride_batch + i_head * stride_head + i_key * stride_key, last, i_key, mask, scale,
            columns, count, stride_query_column, stride_column, stride_mask, COLUMNS, KEYS,
        )  # fmt: skip
        share = tl.math.div_rn(1.0, tl.where(blind, 1.0, total))
        weights = _exp_below(logits, top[:, None]) * share[:, None]
        score += tl.sum(tl.where(logits == float("-inf"), 0.0, weights), 0)
        seeing += tl.where(blind, 0, 1)
    number = tl.maximum(tl.sum(seeing, 0), 1).to(tl.float32)
    tl.store(scores + i_out * count + i_key, tl.math.div_rn(score, number), mask=i_key < count)


def attention_scores(
    query: Tensor, keys: Tensor, mask: Tensor | None, row_positions: Tensor | None, scale: float, per_head: bool
) -> Tensor:
    (b, h, r, d), (k, n) = query.shape, keys.shape[1:3]
    scores = torch.empty((b, k, n) if per_head else (b, n), dtype=torch.float32, device=keys.device)
    if r == 0:
        return scores.zero_()
    few, many = (FEW, MANY) if keys.element_size() == 2 else (FLOAT32_FEW, FLOAT32_MANY)
    tile = few if h // k * r <= few.rows else many
    blocks = triton.cdiv(h // k * r, tile.rows)
    part = max(PART, triton.cdiv(triton.cdiv(n, PARTS), tile.keys) * tile.keys)  # of the number of keys alone
    parts = triton.cdiv(n, part)
    tops, sums = scores.new_empty(b, k, parts, h // k * r), scores.new_empty(b, k, parts, h // k * r)
    if mask is not None:
        mask = mask.view(torch.uint8)
    strides = (
        *query.stride(), *keys.stride(), *(mask.stride() if mask is not None else (0, 0)),
        *(row_positions.stride() if row_positions is not None else (0, 0)),
    )  # fmt: skip
    options = {"ROWS": tile.rows, "KEYS": tile.keys, "COLUMNS": min(tile.columns, block(d)), **LIMITS}
    bits = double_bits(scale)
    launch(
        _statistics_kernel, (b * k * blocks * parts,), query, keys, mask, row_positions, tops, sums, r, h // k, k, n, d,
        parts, part, blocks, bits, *strides, **options,
    )  # fmt: skip
    tiles = triton.cdiv(n, tile.keys)
    launch(
        _scores_kernel, (b * (k if per_head else 1) * tiles,), query, keys, mask, row_positions, tops, sums, scores, r,
        h // k, k, n, d, parts, blocks, tiles, bits, *strides, PER_HEAD=per_head, PARTS=block(parts, 1), **options,
    )  # fmt: skip
    return scores
