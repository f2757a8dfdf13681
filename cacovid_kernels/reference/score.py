"""Row statistics of the policy head: the specification."""

from __future__ import annotations

import torch
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
