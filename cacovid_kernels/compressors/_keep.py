"""What the compressors share: exact top-k with ties to the lower index, and checks."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(scores: Tensor, num_tokens: int) -> Tensor:
    """Ascending indices `[..., num_tokens]` of the largest of `[..., N]`; of equals the first."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :num_tokens].sort(-1).values


def check_count(op: str, num_tokens: int, available: int) -> None:
    """`num_tokens` is a number of tokens that the video has."""
    if not 0 <= num_tokens <= available:
        raise ValueError(f"{op}: num_tokens={num_tokens} must be in [0, N={available}].")


def check_features(op: str, features: Tensor) -> None:
    """`features` is `[..., T, P, C]` and real."""
    if features.dim() < 3 or not features.is_floating_point():
        raise ValueError(f"{op}: features must be real, [..., T, P, C] (features: {list(features.shape)}).")
