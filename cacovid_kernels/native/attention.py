"""Attention scores on the CPU engine."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads


def attention_scores(
    query: Tensor, keys: Tensor, mask: Tensor | None, row_positions: Tensor | None, scale: float, per_head: bool
) -> Tensor:
    b, k, n = keys.shape[:3]
    scores = torch.empty((b, k, n) if per_head else (b, n), dtype=torch.float32, device=CPU)
    engine().attention_scores(query, keys, mask, row_positions, scale, per_head, num_threads(), scores)
    return scores
