"""What the end of a prompt looks at in the last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def query_rows(attention: Any, arguments: tuple[Any, ...], named: dict[str, Any], rows: int) -> Tensor:
    """`[B, H, R, D]` rotated queries of the last R tokens, from what a decoder layer calls its attention with.

    A few rows once more through the projection: cheaper to keep than all queries, and any attention kernel may run.
    """
    hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
    query = attention.q_proj(hidden[:, -rows:]).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    cos, sin = (_one_table(attention, x[..., -rows:, :])[:, None] for x in named["position_embeddings"])
    query, half = query.transpose(1, 2), query.shape[-1] // 2
    return query * cos + torch.cat([-query[..., half:], query[..., :half]], -1) * sin


def _one_table(attention: Any, table: Tensor) -> Tensor:
    """`[B, R, D]` cosines or sines, where older versions of M-RoPE models still hold one `[3, B, R, D]` per axis."""
    if table.dim() == 3:
        return table
    sections = list(attention.config.rope_parameters["mrope_section"]) * 2
    return torch.cat([part[axis % 3] for axis, part in enumerate(table.split(sections, -1))], -1)


def attention_scores(query: Tensor, keys: Tensor, *, mask: Tensor, row_positions: Tensor, scale: float) -> Tensor:
    """`[B, L]` float32, the mean attention of the rows over all heads.

    Args:
        query: `[B, H, R, D]`.
        keys: `[B, K, L, D]`; K divides H.
        mask: `[B, L]` bool, false at keys nobody sees.
        row_positions: `[B, R]` where each row stands; -1 for a row that does not count.
        scale: of the products.
    """
    visible = mask[:, None] & (torch.arange(keys.shape[2], device=keys.device) <= row_positions[..., None])
    total = torch.zeros(mask.shape, device=keys.device)
    for row in range(query.shape[2]):  # one row at a time: H * L numbers
        grouped = query[:, :, row].unflatten(1, (keys.shape[1], -1)).float()  # [B, K, H / K, D]
        logits = grouped @ keys.float().transpose(-1, -2) * scale
        seen = visible[:, None, None, row]
        total += logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0).mean((1, 2))
    return total / (row_positions >= 0).sum(1, keepdim=True).clamp(min=1)
