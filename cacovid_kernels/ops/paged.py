"""Compaction of paged key and value caches: all layers in one call, within the pages or into free ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cacovid_kernels._library import Op
from cacovid_kernels.kv import PagedKV, Rope
from cacovid_kernels.ops._checks import describe
from cacovid_kernels.ops._keep import Keep, keeps_of, rows_of_selection
from cacovid_kernels.ops._overlap import mark_written
from cacovid_kernels.ops._pages import Moves, Pages, check_moves, read_pages, read_table
from cacovid_kernels.ops._rope import tables
from cacovid_kernels.ops.repack import ROTATABLE
from cacovid_kernels.selection import Selection

_OP = "repack_paged_kv"


def _fake_repack(pages, block_table, seq_lens, keep, keep_of, cos, sin, rotated, out_block_table):
    columns = -(-keep[0].shape[2] // pages[0].shape[1])
    per_sequence = [torch.empty_like(seq_lens) for _ in range(3)]
    table = block_table.new_empty((block_table.shape[0], columns))
    return table, per_sequence[0], torch.empty_like(block_table), *per_sequence[1:]


_repack_pages = Op(
    "paged",
    "repack_pages(Tensor(a!)[] pages, Tensor block_table, Tensor seq_lens, Tensor[] keep, int[] keep_of, Tensor[] cos, "
    "Tensor[] sin, bool[] rotated, Tensor? out_block_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_repack,
)


def _positions(keep: Any, sequences: int) -> Any:
    """`keep` with every Selection, which says how long a sequence is, as a tensor; what has ragged heads is refused."""
    per_layer = isinstance(keep, (list, tuple))
    found: dict[int, Any] = {}  # one tensor for layers that share a selection
    for one in keep if per_layer else [keep]:
        if id(one) in found:
            continue
        if isinstance(one, Selection):
            found[id(one)] = rows_of_selection(_OP, one, sequences, one.num_tokens // max(sequences, 1))
        elif isinstance(one, Tensor):
            found[id(one)] = one
        else:
            raise TypeError(
                f"{_OP}: keep holds a {type(one).__name__}, it must be a Selection, an index tensor [K], [B, K] or "
                f"[B, H, K], or a list per layer of these: pages hold equally many rows of every head."
            )
    return [found[id(one)] for one in keep] if per_layer else found[id(keep)]


def _turned(cos: Tensor, sin: Tensor) -> Tensor:
    """[b, h, K]: rows whose angles are not all zero."""
    return ((cos != 1) | (sin != 0)).any(-1)


def _rope_tables(rope: Rope | None, keeps: list[Keep], pages: Pages, b: int, rows: int):
    if rope is None:
        return [], []
    keys = pages.tensors[: len(pages.keys)]
    if any(x.dtype not in ROTATABLE for x in keys):
        raise TypeError(f"{_OP}: rope needs floating keys (keys: {describe(keys[0])}). Convert them first.")
    if rope.positions is not None:  # of as many positions as a sequence may have, not of all slots of its blocks
        rows = rope.positions.shape[-1]
        if keys[0].device.type == "cpu" and not torch.compiler.is_compiling():
            last = max(int(keep.max()) for keep in keeps if isinstance(keep, Tensor))
            if last >= rows:
                raise IndexError(
                    f"{_OP}: keep holds {last}, rope.positions says where {rows} positions are. Extend it."
                )
    return tables(_OP, rope, keeps, [(b, pages.sizes[2], rows)] * len(keeps), min(x.shape[3] for x in keys))


def repack_paged_kv(
    cache: Any,
    block_table: Tensor,
    seq_lens: Tensor,
    keep: Any,
    *,
    layout: str = "NHD",
    out_block_table: Tensor | None = None,
    rope: Rope | None = None,
) -> PagedKV:
    """Keeps some positions of the sequences of a paged key and value cache, all layers in one call.

    Row i that a sequence keeps becomes its row i, so that it needs fewer blocks; the others are reported as freed.
    Rows move bit for bit unless `rope` turns the keys. Nothing is read on the host, except for checks on a CPU.

    Args:
        cache: `(keys, values)`, each a list of per-layer tensors (or one such tensor) that share `blocks`,
            `block_size` and `H`; D may differ. Any real dtype and strides, so one tensor that holds both is passed as
            views: FlashInfer's `[pages, 2, ...]` as `cache.unbind(1)`, vLLM's `[2, blocks, ...]` as `cache.unbind(0)`.
        block_table: `[B, M]` int32 or int64, the block that holds rows `l * block_size` and on of a sequence as
            entry l. Entries behind the blocks in use may be anything.
        seq_lens: `[B]` int32 or int64, rows in use.
        keep: the positions that stay, strictly ascending: a `Selection` over sequences of equal length (see
            `Selection.within`), or int64 or int32 `[K]`, `[B, K]` or `[B, H, K]`, where a shorter list ends in -1. One
            for all layers, or a list with one per layer. All heads and layers of a sequence keep equally many.
        layout: "NHD" for `[blocks, block_size, H, D]`, "HND" for `[blocks, H, block_size, D]`.
        out_block_table: `[B, M2]` blocks of the same tensors, in use by nobody, that the rows are copied to; at least
            `ceil(K / block_size)` for every sequence. Default: rows move to the front of the sequence's own blocks.
            They only move towards the front, in ascending order, so none is overwritten before it is read, and a row
            that stays where it is, unturned, is not written: a prefix that sequences share stays as it is. No other
            block that is written may be used twice.
        rope: turns the keys to new positions, by default 0, 1, 2, ...; generation then goes on at position K.
            Without it the keys keep their old positions, and so must what follows. `rope.positions` may be as long as
            the longest sequence.

    Returns:
        `PagedKV`: the same tensors, the new block table and lengths, and the blocks that every sequence gave up.

    Raises:
        ValueError, TypeError: an argument breaks its rule. On a CPU also if a block that is written is used twice.
        IndexError: a position or a block id is out of range. Both are checked on the CPU; elsewhere a wrong position
            gives a row of zeros and a wrong block is not written, which `status` says, and a block that is used twice
            gives wrong rows; no access is ever out of bounds.
        RuntimeError: the cache requires a gradient; this op has none.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> keys = torch.arange(8.0).view(4, 2, 1, 1)  # 4 blocks of 2 rows
        >>> table, lengths = torch.tensor([[3, 0, 2]]), torch.tensor([6])
        >>> kept = ck.repack_paged_kv((keys, keys.clone()), table, lengths, torch.tensor([0, 3, 4]))
        >>> kept.block_table, kept.seq_lens, kept.freed_blocks[0, : kept.num_freed[0]]
        (tensor([[3, 0]], dtype=torch.int32), tensor([3], dtype=torch.int32), tensor([2], dtype=torch.int32))
        >>> keys[[3, 0]].flatten()
        tensor([6., 1., 4., 1.])
    """
    pages = read_pages(_OP, cache, layout)
    table = read_table(_OP, "block_table", block_table, pages, 2, None)
    b = table.shape[0]
    lens = read_table(_OP, "seq_lens", seq_lens, pages, 1, b)
    target = table
    if out_block_table is not None:
        target = read_table(_OP, "out_block_table", out_block_table, pages, 2, b)
    _, block_size, heads = pages.sizes
    layers, rows = len(pages.keys), table.shape[1] * block_size
    keeps, layer_keeps = keeps_of(_OP, _positions(keep, b), [(b, heads, rows)] * layers, lens.device)
    index = [k for k in keeps if isinstance(k, Tensor)]
    kept = index[0].shape[2]
    if any(k.shape[2] != kept for k in index):
        raise ValueError(f"{_OP}: all layers must keep equally many rows, got {[k.shape[2] for k in index]}.")
    if kept == 0:
        raise ValueError(f"{_OP}: keep is empty, and attention to an empty cache is NaN. Keep at least one position.")
    for name, where in (("block_table", table), ("out_block_table", target)):
        if kept > where.shape[1] * block_size:
            raise ValueError(
                f"{_OP}: {name} {list(where.shape)} has room for {where.shape[1] * block_size} rows of a sequence, "
                f"keep has {kept}. Add blocks, or keep fewer."
            )
    cos, sin = _rope_tables(rope, keeps, pages, b, rows)
    out = None if out_block_table is None else target
    if lens.device.type == "cpu" and not torch.compiler.is_compiling():
        turned = [_turned(*angles) for angles in zip(cos, sin, strict=True)] if rope else [None] * len(index)
        check_moves(_OP, Moves(pages.sizes, table, lens, out, index, turned))
    rotated = [rope is not None] * layers + [False] * layers
    with torch.no_grad():
        found = _repack_pages(pages.tensors, table, lens, index, layer_keeps * 2, cos, sin, rotated, out)
        mark_written(pages.tensors)
    return PagedKV(pages.keys, pages.values, *found)
