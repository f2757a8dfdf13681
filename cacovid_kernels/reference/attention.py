"""Attention that a few query rows pay to every key: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_scores(
    query: Tensor, keys: Tensor, mask: Tensor | None, row_positions: Tensor | None, scale: float, per_head: bool
) -> Tensor:
    (b, h, r, d), (k, n) = query.shape, keys.shape[1:3]
    seen = torch.ones(b, r, n, dtype=torch.bool, device=keys.device)  # [B, R, L]
    if mask is not None:
        seen = seen & mask[:, None]
    if row_positions is not None:
        seen = seen & (torch.arange(n, device=keys.device) <= row_positions[..., None])
    with torch.autocast(keys.device.type, enabled=False):
        rows = query.float().reshape(b, k, h // k * r, d)  # [B, K, H / K * R, D]
        logits = (rows @ keys.float().transpose(-1, -2)).view(b, k, h // k, r, n) * scale  # [B, K, H / K, R, L]
    hidden = ~seen[:, None, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    live = seen.any(-1).sum(-1).clamp(min=1)[:, None]  # [B, 1], rows that see a key
    totals = weights.sum((2, 3))  # [B, K, L]
    if per_head:
        return totals / (live[..., None] * (h // k))
    return totals.sum(1) / (live * h)
