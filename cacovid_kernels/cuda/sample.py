"""Gumbel top-k as one CUDA kernel. The probability of given draws, and its derivatives, are Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.cuda import kernels, queue_of


def gumbel_topk(
    logits: Tensor, k: int, num_samples: int, seed: int, step: int, added_steps: Tensor | None, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, device = logits.shape[0], logits.device
    indices = torch.empty(num_samples, rows, k, dtype=torch.int64, device=device)
    log_prob = torch.empty(num_samples, rows, dtype=torch.float32, device=device)
    status = torch.empty(rows, dtype=torch.int32, device=device)
    kernels().gumbel_topk(
        logits, k, num_samples, seed, step, added_steps, stream, indices, log_prob, status, *queue_of(device)
    )
    return indices, log_prob, status
