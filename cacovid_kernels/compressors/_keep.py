"""What the compressors share: top-k along the last axis, tokens that are no numbers, and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.ops.select import segmented_topk


def keep_largest(scores: Tensor, num_tokens: int) -> Tensor:
    """Ascending indices `[..., num_tokens]` of the largest of `[..., N]`; of equals the first, NaN last."""
    rows, count = scores.shape[:-1].numel(), scores.shape[-1]
    flat = segmented_topk(scores.detach().float().reshape(rows, count), num_tokens)
    first = torch.arange(rows, device=scores.device)[:, None] * count
    return (flat.view(rows, num_tokens) - first).view(*scores.shape[:-1], num_tokens)


def without_odd(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[..., C]` with zeros for tokens that have a NaN or an infinity, and `[...]` bool, which these are."""
    odd = ~features.isfinite().all(-1)
    return features.masked_fill(odd[..., None], 0.0), odd


def can_be_read(x: Tensor) -> bool:
    """Whether the values of `x` are at hand: on the CPU, and no tracer's or transform's."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.device.type == "cpu" and not traced


def check_count(op: str, num_tokens: int, available: int) -> None:
    """`num_tokens` is a number of tokens that the video has."""
    if not 0 <= num_tokens <= available:
        raise ValueError(f"{op}: num_tokens={num_tokens} must be in [0, N={available}]. Ask for at most {available}.")


def check_features(op: str, features: Tensor) -> None:
    """`features` is `[..., T, P, C]` and real."""
    if features.dim() < 3 or not features.is_floating_point():
        raise ValueError(f"{op}: features must be real, [..., T, P, C] (features: {list(features.shape)}).")
