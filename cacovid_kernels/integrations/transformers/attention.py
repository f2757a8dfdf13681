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
