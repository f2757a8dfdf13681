"""Compaction of the keys and values of all layers: what people write, layer by layer, and faster forms of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def baselines(tensors: list[Tensor], kept: int) -> dict[str, Callable[[Tensor], object]]:
    """Functions of the kept positions `[kept]`, for a cache of `[B, H, N, D]` tensors."""
    b, heads, tokens, size = tensors[0].shape
    outs = [torch.zeros(b, heads, kept, size, dtype=x.dtype, device=x.device) for x in tensors]
    first = (torch.arange(b * heads, device=tensors[0].device) * tokens)[:, None]
    flat = [(x.view(-1, size), out.view(-1, size)) for x, out in zip(tensors, outs, strict=True)]

    def select_out(i: Tensor) -> list[Tensor]:
        for x, out in zip(tensors, outs, strict=True):
            torch.index_select(x, 2, i, out=out)
        return outs

    def select_flat(i: Tensor) -> list[Tensor]:
        rows = (first + i).reshape(-1)
        for x, out in flat:
            torch.index_select(x, 0, rows, out=out)
        return outs

    def expanded(i: Tensor) -> list[Tensor]:
        return [x.gather(2, i[None, None, :, None].expand(b, heads, -1, size)).contiguous() for x in tensors]

    return {
        "index_select(out=)": select_out,
        "index_select(out=), flat": select_flat,
        "index_select": lambda i: [x.index_select(2, i) for x in tensors],
        "x[:, :, idx]": lambda i: [x[:, :, i] for x in tensors],
        "gather, expanded index": expanded,
    }
