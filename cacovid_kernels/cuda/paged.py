"""Compaction of paged key and value caches, rows and tables, as one CUDA launch."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels.cuda import kernels, queue_of


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
    shapes = ((b, -(-keep[0].shape[2] // pages[0].shape[1])), (b,), (b, width), (b,), (b,))
    device = block_table.device
    table, lengths, freed, num_freed, status = [torch.empty(s, dtype=torch.int32, device=device) for s in shapes]
    kernels().repack_pages(
        [as_bits(x) for x in pages], block_table, seq_lens, [k.contiguous() for k in keep], keep_of, cos, sin, rotated,
        out_block_table, table, lengths, freed, num_freed, status, *queue_of(device),
    )  # fmt: skip
    return table, lengths, freed, num_freed, status
