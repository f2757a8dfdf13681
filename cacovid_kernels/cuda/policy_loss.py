"""The policy loss and the masks that it reads as CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.cuda import kernels, queue_of
from cacovid_kernels.reference.policy_loss import policy_loss_backward as policy_loss_backward


def pack_masks(masks: Tensor) -> Tensor:
    words = torch.empty(masks.shape[0], -(-masks.shape[1] // 32), dtype=torch.int32, device=masks.device)
    kernels().pack_masks(masks, words, *queue_of(masks.device))
    return words


def pack_indices(indices: Tensor, num_tokens: int) -> Tensor:
    words = torch.zeros(indices.shape[0], -(-num_tokens // 32), dtype=torch.int32, device=indices.device)
    kernels().pack_indices(indices, num_tokens, words, *queue_of(indices.device))
    return words


def policy_sums(words: Tensor, rewards: Tensor, num_tokens: int, balanced: bool) -> Tensor:
    (b, g), device = rewards.shape, words.device
    weights = torch.empty(b, g, 2, dtype=torch.float64, device=device)
    sums = torch.empty(b, 6, num_tokens, dtype=torch.float64, device=device)
    kernels().policy_sums(words.contiguous(), rewards, num_tokens, balanced, weights, sums, *queue_of(device))
    return sums


def policy_loss(
    logits: Tensor, old_logits: Tensor, sums: Tensor, eps_low: float, eps_high: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    (b, n), device = logits.shape[:2], logits.device
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=dtype, device=device)
    gradient = torch.empty(logits.shape, dtype=dtype, device=device)
    parts = torch.empty(kernels().policy_loss_parts(b, n), dtype=torch.float64, device=device)
    kernels().policy_loss(
        logits, old_logits, sums.contiguous(), 1.0 - eps_low, 1.0 + eps_high, kl_weight, parts, loss, gradient,
        *queue_of(device),
    )  # fmt: skip
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
    sums = policy_sums(words, rewards, logits.shape[1], balanced)
    return policy_loss(logits, old_logits, sums, eps_low, eps_high, kl_weight)
