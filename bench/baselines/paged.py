"""Compaction of paged keys and values within their pages, layer by layer: what plain torch offers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def baselines(tensors: list[Tensor], table: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """Functions of the positions `[kept]` that every sequence keeps; pages are contiguous `[blocks, size, H, D]`."""
    size = tensors[0].shape[1]
    flat = [x.view(-1, *x.shape[2:]) for x in tensors]

    def slots(i: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(i.numel(), device=i.device)
        source, target = (table[:, at // size] * size + at % size for at in (i, rows))
        return source.reshape(-1), target.reshape(-1)

    def index_copy(i: Tensor) -> list[Tensor]:
        source, target = slots(i)
        for x in flat:
            x.index_copy_(0, target, x.index_select(0, source))
        return tensors

    def advanced(i: Tensor) -> list[Tensor]:
        source, target = slots(i)
        for x in flat:
            x[target] = x[source]
        return tensors

    def by_block_and_slot(i: Tensor) -> list[Tensor]:
        rows = torch.arange(i.numel(), device=i.device)
        source, target = ((table[:, at // size], (at % size).expand(len(table), -1)) for at in (i, rows))
        for x in tensors:
            x[target] = x[source]
        return tensors

    return {
        "index_select, index_copy_": index_copy,
        "x[slots] = x[slots]": advanced,
        "x[blocks, slots] = x[blocks, slots]": by_block_and_slot,
    }
