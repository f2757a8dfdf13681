"""Compaction of paged key and value caches: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.reference.repack import rotate
from cacovid_kernels.selection import Status


def _slots(table: Tensor, rows: Tensor, limit: Tensor, blocks: int, block_size: int) -> Tensor:
    """Slots of the cache, counted through all blocks, that hold rows [B, h, K] of the sequences; -1 for none.

    A row outside [0, limit) has none, nor one in a block whose id is outside [0, blocks).
    """
    m = table.shape[1]
    inside = (rows >= 0) & (rows < limit) & (rows < m * block_size)  # [B, h, K]
    logical = (rows // block_size).clamp(0, m - 1)
    block = table.long().gather(1, logical.flatten(1)).view(rows.shape)
    inside = inside & (block >= 0) & (block < blocks)
    return torch.where(inside, block * block_size + rows % block_size, -1)


def _used(rows: Tensor, block_size: int) -> Tensor:
    return (rows + block_size - 1) // block_size


def _front(ids: Tensor, first: Tensor, count: Tensor, columns: int) -> Tensor:
    """[B, columns] int32: `count` entries of every row from `first` on, then -1."""
    column = torch.arange(columns, device=ids.device)  # [columns]
    at = (first[:, None] + column).clamp(max=ids.shape[1] - 1)  # [B, columns]
    return torch.where(column < count[:, None], ids.long().gather(1, at), -1).int()


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
    """keep[j] is [b, h, K]; pages[i] [blocks, block_size, H, D] uses keep[keep_of[i]] and is turned if rotated.

    Returns the block table [B, ceil(K / block_size)] and lengths [B] of the kept rows, freed blocks [B, M], their
    numbers [B] and the status [B], all int32.
    """
    blocks, block_size, heads, _ = pages[0].shape
    b, m = block_table.shape
    in_place = out_block_table is None
    targets = block_table if out_block_table is None else out_block_table
    lens = seq_lens.long()  # [B]
    kept_rows = keep[0].shape[2]
    new_rows = torch.arange(kept_rows, device=keep[0].device).expand(b, 1, -1)  # [B, 1, K]
    target = _slots(targets, new_rows, lens.new_tensor(kept_rows), blocks, block_size)  # [B, 1, K]

    status = torch.zeros_like(seq_lens)
    sources = []
    for k in keep:
        source = _slots(block_table, k.expand(b, -1, -1), lens[:, None, None], blocks, block_size)  # [B, h, K]
        outside = ((k != -1) & ((source < 0) | (target < 0))).flatten(1).any(1)  # [B]
        status = status | outside.int() * Status.OUT_OF_BOUNDS.value
        sources.append(source)

    spare = blocks * block_size  # a row behind the cache: reads of nothing and writes to nothing go there
    head = torch.arange(heads, device=block_table.device)[None, :, None]  # [1, H, 1]
    for x, j, turn in zip(pages, keep_of, rotated, strict=True):
        bits, source = as_bits(x), sources[j].expand(b, heads, -1)  # [B, H, K]
        rows = torch.cat([bits.flatten(0, 1), bits.new_zeros(1, *bits.shape[2:])])  # [blocks * block_size + 1, H, D]
        moved = rows[torch.where(source < 0, spare, source), head].view(x.dtype)  # [B, H, K, D]
        stays = (source >= 0) & (keep[j] == new_rows) if in_place else torch.zeros_like(source, dtype=torch.bool)
        if turn:
            moved = rotate(moved, cos[j], sin[j])
            moved = as_bits(moved).masked_fill((source < 0)[..., None], 0).view(x.dtype)
            stays = stays & ((cos[j] == 1) & (sin[j] == 0)).all(-1)
        written = (keep[j] != -1) & (target >= 0) & ~stays  # [B, H, K]
        rows[torch.where(written, target, spare), head] = as_bits(moved)
        bits.copy_(rows[:spare].view(bits.shape))

    lengths = (keep[0][:, 0] != -1).sum(-1).expand(b)  # [B]
    used_before, used = _used(lens.clamp(min=0), block_size).clamp(max=m), _used(lengths, block_size)
    first_freed = used if in_place else torch.zeros_like(used)
    num_freed = (used_before - first_freed).clamp(min=0)
    return (
        _front(targets, torch.zeros_like(used), used, -(-kept_rows // block_size)),
        lengths.int(),
        _front(block_table, first_freed, num_freed, m),
        num_freed.int(),
        status,
    )
