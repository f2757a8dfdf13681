"""Row statistics and scores of the policy head: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_pool(hidden: Tensor, grid_thw: list[int], eps: float) -> tuple[Tensor, Tensor]:
    x = hidden.float()  # [N, D]
    rrms = torch.rsqrt(x.square().mean(dim=1) + eps)  # [N]
    means, start = [], 0
    for t, h, w in zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True):
        frames = x[start : start + t * h * w].reshape(t, h * w, -1)  # [t, h * w, D]
        means.append(frames.mean(dim=1))
        start += t * h * w
    return rrms, torch.cat(means) if means else x.new_empty(0, x.shape[1])  # [F, D]


def head_scores(
    rows: Tensor, rrms: Tensor | None, weights: list[Tensor], biases: list[Tensor], vector: Tensor, offset: Tensor
) -> Tensor:
    scale = None if rrms is None else rrms[:, None].to(rows.dtype)
    if scale is not None and rows.dtype is torch.float16:
        rows, scale = rows * scale, None  # products of the rows as they are could pass 65504
    if scale is None:
        rows = F.linear(rows, weights[0], biases[0])  # [N, D / 2]
    else:  # the product is half as wide as the rows: half the traffic
        rows = torch.addcmul(biases[0], F.linear(rows, weights[0]), scale)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        rows = F.linear(F.silu(rows, inplace=True), weight, bias)  # [N, D / 4], [N, D / 8], [N, D / 16]
    return (F.silu(rows, inplace=True) * vector).sum(1) + offset  # [N]
