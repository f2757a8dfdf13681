"""The adjoint of a gather as a Triton kernel: rows of a token are summed in ascending position of the index."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.storage import FP32, FP64, KINDS, as_words, narrow, number, widen
from cacovid_kernels.triton.words import flat_index, seal, width_of

TENSORS = 8  # of one launch: each has its own code in the kernel
TILE, TILE_COLUMNS = 2048, 512  # elements of a program of 4 warps, and how many of a row


class Sums(NamedTuple):
    """One tensor: gradients [outer, kept, columns] and sums [outer, tokens, columns], columns counted in vectors."""

    source: Any
    target: Any
    first: int  # its programs are [first, last)
    last: int
    row_tiles: int
    column_tiles: int
    tokens: int
    columns: int


@triton.jit
def _sum_tile(
    x, starts, order, kept, p, KIND: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    ROWS: tl.constexpr = TILE // COLUMNS
    row_tiles, column_tiles = number(x.row_tiles).to(tl.int32), number(x.column_tiles).to(tl.int32)
    columns, tokens = number(x.columns), number(x.tokens)
    outer = (p // column_tiles // row_tiles).to(tl.int64)
    i_token = (p // column_tiles % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = (p % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_token, m_column = i_token < tokens, (i_column // VECTOR < columns)[None, :]
    begin = tl.load(starts + i_token, mask=m_token, other=0)
    terms = tl.load(starts + i_token + 1, mask=m_token, other=0) - begin
    ITEM: tl.constexpr = 2 if KIND < FP32 else 4 if KIND == FP32 else 8
    source, target = as_words(x.source, ITEM), as_words(x.target, ITEM)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float64 if KIND == FP64 else tl.float32)
    for j in range(tl.max(terms, 0)):
        m_term = j < terms
        i_row = outer * kept + tl.load(order + begin + j, mask=m_term, other=0)
        o_row = (i_row * columns * VECTOR)[:, None]
        bits = tl.load(source + o_row + i_column[None, :], mask=m_term[:, None] & m_column, other=0)
        b_sum += widen(bits, KIND)  # a sum that began at +0 is never -0, so adding 0 leaves its bits
    o_token = ((outer * tokens + i_token) * columns * VECTOR)[:, None]
    tl.store(target + o_token + i_column[None, :], narrow(b_sum, KIND), mask=m_token[:, None] & m_column)


@triton.jit(do_not_specialize=["kept"])
def scatter_kernel(
    starts, order, kept: tl.int64, tensors, FLOATS: tl.constexpr, VECTORS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """tensors: `Sums`. Token n sums the rows order[starts[n] : starts[n + 1]], in that order, rounded once."""
    p = tl.program_id(0)
    for t in tl.static_range(len(tensors)):
        first, last = number(tensors[t].first).to(tl.int32), number(tensors[t].last).to(tl.int32)
        if (p >= first) & (p < last):
            _sum_tile(tensors[t], starts, order, kept, p - first, FLOATS[t], VECTORS[t], COLUMNS[t], TILE)


def scatter_rows(grads: list[Tensor], index: Tensor, sizes: list[int], dims: list[int]) -> list[Tensor]:
    flat = flat_index(index)
    # A stable sort: positions ascend within a token. Indices out of range lie before the first token's or behind the
    # last one's.
    tokens, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(tokens, torch.arange(max(sizes, default=0) + 1, device=flat.device))
    outs = []
    for grad, size, dim in zip(grads, sizes, dims, strict=True):
        shape = (*grad.shape[:dim], size, *grad.shape[dim + index.dim() :])
        outs.append(torch.empty(shape, dtype=grad.dtype, device=grad.device))
    some = [i for i, out in enumerate(outs) if out.numel() > 0]
    for at in range(0, len(some), TENSORS):
        tensors, constants, programs = [], [], 0
        for i in some[at : at + TENSORS]:
            rows, programs, constant = _sums(grads[i].contiguous(), outs[i], sizes[i], dims[i], programs)
            tensors.append(rows)
            constants.append(constant)
        floats, vectors, columns = zip(*constants, strict=True)
        launch(
            scatter_kernel, (programs,), starts, order, flat.numel(), tuple(tensors), FLOATS=floats, VECTORS=vectors,
            COLUMNS=columns, TILE=TILE,
        )  # fmt: skip
    return outs


def _sums(grad: Tensor, out: Tensor, tokens: int, dim: int, first: int) -> tuple[Sums, int, tuple[int, int, int]]:
    """A tensor of `scatter_kernel` whose programs begin at `first`, where they end, and KIND, VECTOR and COLUMNS."""
    columns, item = math.prod(out.shape[dim + 1 :]), grad.element_size()
    vector = 16 // item if width_of([grad, out], columns * item) == 16 else 1
    tile_columns = min(block(columns, vector), TILE_COLUMNS)
    row_tiles, column_tiles = triton.cdiv(tokens, TILE // tile_columns), triton.cdiv(columns, tile_columns)
    last = first + math.prod(out.shape[:dim]) * row_tiles * column_tiles
    sums = Sums(
        source=grad,
        target=out,
        first=seal(first),
        last=seal(last),
        row_tiles=seal(row_tiles),
        column_tiles=seal(column_tiles),
        tokens=seal(tokens),
        columns=seal(columns // vector),
    )
    return sums, last, (KINDS[grad.dtype], vector, tile_columns)
