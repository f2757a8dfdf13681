"""The pages of a paged cache as its kernels see them, and what only a CPU checks of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import check_choice, describe
from cacovid_kernels.ops._overlap import byte_range, has_broadcast_axis, share_elements

_AXES = {"NHD": "[blocks, block_size, H, D]", "HND": "[blocks, H, block_size, D]"}


class Pages(NamedTuple):
    """Keys and values of every layer as they were passed, and all of them as `[blocks, block_size, H, D]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tensors: list[Tensor]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """blocks, block_size, H."""
        blocks, block_size, heads, _ = self.tensors[0].shape
        return blocks, block_size, heads


def read_pages(op: str, cache: Any, layout: str) -> Pages:
    """The pages of `(keys, values)`, or TypeError, ValueError or RuntimeError naming what is wrong."""
    check_choice(op, "layout", layout, tuple(_AXES))
    if not isinstance(cache, (list, tuple)) or len(cache) != 2:
        raise TypeError(
            f"{op}: cache is a {type(cache).__name__}, it must be (keys, values). One tensor that holds both is split "
            f"by cache.unbind(axis)."
        )
    keys, values = ((x,) if isinstance(x, Tensor) else tuple(x) for x in cache)
    if len(keys) != len(values) or not keys:
        raise ValueError(f"{op}: cache has {len(keys)} keys and {len(values)} values, it must have one per layer.")
    tensors = []
    for name, xs in (("keys", keys), ("values", values)):
        for layer, x in enumerate(xs):
            _check_one(op, f"{name} of layer {layer}", x, keys[0], layout)
            tensors.append(x if layout == "NHD" else x.transpose(1, 2))
    if not torch.compiler.is_compiling() and not tensors[0].is_meta:
        for a, b in pairwise(sorted(tensors, key=byte_range)):
            if share_elements(a, b):
                raise ValueError(
                    f"{op}: two of the tensors share memory, which would be moved twice ({describe(a)}, strides "
                    f"{list(a.stride())}). Pass each tensor once."
                )
    return Pages(keys, values, tensors)


def _check_one(op: str, name: str, x: Any, first: Any, layout: str) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_complex() or x.is_quantized:
        raise TypeError(
            f"{op}: {name} must be a strided tensor, neither complex nor quantized, got {type(x).__name__}."
        )
    if x.dim() != 4 or x.shape[:3] != first.shape[:3] or x.device != first.device:
        raise ValueError(
            f"{op}: {name} must be {_AXES[layout]} on {first.device}, equal to the first keys but for D "
            f"({name}: {describe(x)}, first keys: {describe(first)})."
        )
    if x.numel() == 0:
        raise ValueError(f"{op}: {name} hold nothing ({describe(x)}). Pass pages with at least one element.")
    if has_broadcast_axis(x):
        raise ValueError(
            f"{op}: {name} need every element in memory of its own ({describe(x)}). Call .clone() on them."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: has no gradient, but {name} require one. Call it under torch.no_grad().")


def read_table(op: str, name: str, table: Any, pages: Pages, dims: int, rows: int | None) -> Tensor:
    """A table of block ids or lengths as contiguous int32, `rows` long; numbers beyond int32 stay out of range."""
    if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
        what = describe(table) if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor ({name}: {what}). Convert it first.")
    device = pages.tensors[0].device
    if table.device != device:
        raise ValueError(f"{op}: the cache is on {device} but {name} on {table.device}. Move {name} to {device}.")
    if table.dim() != dims or (rows is not None and table.shape[0] != rows):
        shape = ("B" if rows is None else str(rows)) + (", M" if dims == 2 else "")
        raise ValueError(f"{op}: {name} must be [{shape}] ({name}: {describe(table)}).")
    if table.dtype == torch.int64:
        table = table.clamp(-1, 2**31 - 1).to(torch.int32)
    return table.contiguous()


class Moves(NamedTuple):
    """A call with the values that only a CPU checks. `turned` of a list: `[b, h, K]`, whether keys are, or None."""

    sizes: tuple[int, int, int]
    block_table: Tensor
    seq_lens: Tensor
    out_block_table: Tensor | None
    keeps: Sequence[Tensor]
    turned: Sequence[Tensor | None]


def check_moves(op: str, m: Moves) -> None:
    """Every row that is kept exists, and no block that is written is also used by somebody else."""
    blocks, block_size, _ = m.sizes
    b, width = m.block_table.shape
    table, lens = m.block_table.long(), m.seq_lens.long()
    if ((lens < 0) | (lens > width * block_size)).any():
        raise ValueError(
            f"{op}: seq_lens must be in [0, M * block_size = {width * block_size}], it holds "
            f"{lens.min().item()} to {lens.max().item()}. Pass the rows in use and all of their blocks."
        )
    uses = torch.zeros(b, width, dtype=torch.bool)  # of logical blocks
    writes = torch.zeros_like(uses)
    counts = (m.keeps[0][:, 0] >= 0).sum(-1)  # [b]
    rows = torch.arange(m.keeps[0].shape[2])
    for keep, turned in zip(m.keeps, m.turned, strict=True):
        beyond = keep >= lens[:, None, None]
        if beyond.any():
            at = beyond.nonzero()[0].tolist()
            position = keep.expand(b, -1, -1)[tuple(at)].item()
            raise IndexError(
                f"{op}: keep holds {position} for sequence {at[0]}, which has {lens[at[0]].item()} rows "
                f"(keep: {describe(keep)}). Keep positions in [0, seq_len)."
            )
        if ((keep >= 0).sum(-1) != counts[:, None]).any():
            raise ValueError(
                f"{op}: all heads and layers of a sequence must keep equally many rows (keep: {describe(keep)}). "
                f"Pad by keeping more, or use repack_kv with a RaggedKeep."
            )
        inside = keep >= 0
        _mark(uses, keep, inside, block_size)
        moved = inside & (keep != rows) if turned is None else inside & ((keep != rows) | turned)
        _mark(writes, rows.expand(*moved.shape), moved, block_size)
    used = -(-counts.expand(b)[:, None] // block_size)
    if m.out_block_table is None:
        uses |= torch.arange(width) < used
        _check_ids(op, "block_table", table[uses], blocks)
        taken, written = table[uses], table[writes]
    else:
        before = table[torch.arange(width) < -(-lens[:, None] // block_size)]
        targets = m.out_block_table.long()
        written = targets[torch.arange(targets.shape[1]) < used]
        _check_ids(op, "block_table", table[uses], blocks)
        _check_ids(op, "out_block_table", written, blocks)
        taken = torch.cat([before[(before >= 0) & (before < blocks)], written])
    users = torch.bincount(taken, minlength=blocks)
    shared = written[users[written] > 1]
    if shared.numel():
        remedy = (
            "Copy it first: blocks may be shared only where every row stays."
            if m.out_block_table is None
            else "Pass free blocks, each of them once."
        )
        raise ValueError(f"{op}: block {shared[0].item()} would be written, but is used more than once. {remedy}")


def _mark(blocks: Tensor, rows: Tensor, marked: Tensor, block_size: int) -> None:
    """Marks the logical blocks [B, M] of those rows [b, h, K] that are marked."""
    b = blocks.shape[0]
    hits = torch.zeros_like(blocks, dtype=torch.int32)
    at = (rows.clamp(min=0) // block_size).expand(b, -1, -1).flatten(1)
    hits.scatter_add_(1, at, marked.int().expand(b, -1, -1).flatten(1))
    blocks |= hits > 0


def _check_ids(op: str, name: str, ids: Tensor, blocks: int) -> None:
    outside = (ids < 0) | (ids >= blocks)
    if outside.any():
        raise IndexError(
            f"{op}: {name} holds {ids[outside][0].item()} where rows are kept, block ids must be in [0, {blocks}). "
            f"Entries behind the blocks in use may be anything."
        )
