"""Row statistics of the policy head on the CPU engine; its products are those of torch, which has oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads
from cacovid_kernels.reference.score import head_scores as head_scores


def frame_pool(hidden: Tensor, grid_thw: list[int], eps: float) -> tuple[Tensor, Tensor]:
    rrms = torch.empty(hidden.shape[0], dtype=torch.float32, device=CPU)
    frame_mean = torch.empty(sum(grid_thw[::3]), hidden.shape[1], dtype=torch.float32, device=CPU)
    engine().frame_pool(hidden, grid_thw, eps, num_threads(), rrms, frame_mean)
    return rrms, frame_mean
