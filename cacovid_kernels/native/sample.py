"""Gumbel top-k and Plackett-Luce log-probabilities on the CPU engine."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads


def step_of(step: int, added_steps: Tensor | None) -> int:
    """The step that counts, in [0, 2^32)."""
    return step if added_steps is None else (step + int(added_steps)) % 2**32


def gumbel_topk(
    logits: Tensor, k: int, num_samples: int, seed: int, step: int, added_steps: Tensor | None, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    indices = torch.empty(num_samples, rows, k, dtype=torch.int64, device=CPU)
    log_prob = torch.empty(num_samples, rows, dtype=torch.float32, device=CPU)
    status = torch.empty(rows, dtype=torch.int32, device=CPU)
    step = step_of(step, added_steps)
    engine().gumbel_topk(logits, k, num_samples, seed, step, stream, num_threads(), indices, log_prob, status)
    return indices, log_prob, status


def pl_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    out = torch.empty(indices.shape[:2], dtype=torch.float64, device=CPU)
    engine().pl_log_prob(logits, indices, num_threads(), out)
    return out if logits.dtype == torch.float64 else out.float()


def pl_log_prob_backward(grad: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    out = torch.empty(logits.shape, dtype=torch.float64, device=CPU)
    engine().pl_log_prob_backward(grad.double().contiguous(), logits, indices, num_threads(), out)
    return out.to(logits.dtype)


def pl_log_prob_double_backward(
    direction: Tensor, grad: Tensor, logits: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    grad_grad = torch.empty(grad.shape, dtype=torch.float64, device=CPU)
    grad_logits = torch.empty(logits.shape, dtype=torch.float64, device=CPU)
    engine().pl_log_prob_double_backward(
        direction.double().contiguous(), grad.double().contiguous(), logits, indices, num_threads(),
        grad_grad, grad_logits,
    )  # fmt: skip
    return grad_grad.to(grad.dtype), grad_logits.to(logits.dtype)
