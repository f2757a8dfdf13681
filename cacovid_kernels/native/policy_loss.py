"""The policy loss and the masks that it reads on the CPU engine."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads
from cacovid_kernels.reference.policy_loss import policy_loss_backward as policy_loss_backward


def pack_masks(masks: Tensor) -> Tensor:
    words = torch.empty(masks.shape[0], -(-masks.shape[1] // 32), dtype=torch.int32, device=CPU)
    engine().pack_masks(masks, num_threads(), words)
    return words


def pack_indices(indices: Tensor, num_tokens: int) -> Tensor:
    words = torch.empty(indices.shape[0], -(-num_tokens // 32), dtype=torch.int32, device=CPU)
    engine().pack_indices(indices, num_tokens, num_threads(), words)
    return words


def policy_sums(words: Tensor, rewards: Tensor, num_tokens: int, balanced: bool) -> Tensor:
    sums = torch.empty(rewards.shape[0], 6, num_tokens, dtype=torch.float64, device=CPU)
    engine().policy_sums(words.contiguous(), rewards, num_tokens, balanced, True, num_threads(), sums)
    return sums


def policy_loss(
    logits: Tensor, old_logits: Tensor, sums: Tensor, eps_low: float, eps_high: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=dtype, device=CPU)
    gradient = torch.empty(logits.shape, dtype=dtype, device=CPU)
    engine().policy_loss(
        logits, old_logits, sums.contiguous(), 1.0 - eps_low, 1.0 + eps_high, kl_weight, num_threads(), loss, gradient
    )
    return loss, gradient


def policy_loss_once(
    logits: Tensor,
    old_logits: Tensor,
    words: Tensor,
    rewards: Tensor,
    balanced: bool,
    eps_low: float,
    eps_high: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor]:
    sums = torch.empty(rewards.shape[0], 6, logits.shape[1], dtype=torch.float64, device=CPU)
    weights = kl_weight != 0.0  # otherwise nothing reads them, and they are half of the additions
    engine().policy_sums(words.contiguous(), rewards, logits.shape[1], balanced, weights, num_threads(), sums)
    return policy_loss(logits, old_logits, sums, eps_low, eps_high, kl_weight)
