"""The policy loss of one video as the published trainer computes it, and rewritten for torch."""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = 0.8, 1.28


def _of_action(log_p: Tensor, masks: Tensor) -> Tensor:
    return log_p.unsqueeze(0).repeat(masks.shape[0], 1, 1).gather(-1, masks.unsqueeze(-1)).squeeze(-1)


def published_formula(logits: Tensor, old_logits: Tensor, masks: Tensor, rewards: Tensor) -> Tensor:
    """Logits `[N, 2]`, masks `[G, N]` bool: every (combination, token) has its own copy of the log-probabilities."""
    masks = masks.long()
    new, old = (_of_action(x.log_softmax(-1), masks) for x in (logits, old_logits))
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).unsqueeze(1)
    ratio = torch.exp(new - old)
    loss = -torch.min(ratio * advantage, ratio.clamp(LOW, HIGH) * advantage)
    share = masks.float().mean(-1, keepdim=True)
    weight = masks * (1 - share) + (1 - masks) * share
    return ((loss * weight).sum(-1) / (weight.sum(-1) + 1e-7)).mean()


def fewest_passes(logits: Tensor, old_logits: Tensor, masks: Tensor, rewards: Tensor) -> Tensor:
    """The same without copies: ratios per token and action, the batch's weighted advantages by products of matrices."""
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    kept = masks.float()
    share = kept.mean(-1)
    count = masks.shape[1]
    scale = (2 * count * share * (1 - share) + 1e-7) * masks.shape[0]
    weights = torch.stack([(1 - share) / scale, share / scale]) * advantage  # [2, G]
    signed = torch.stack([weights.clamp(min=0) * (advantage > 0), weights * (advantage <= 0)])  # [sign, action, G]
    sums = torch.stack([signed[:, 0] @ kept, signed[:, 1] @ (1 - kept)], -1)  # [sign, N, 2]
    ratio = (logits.log_softmax(-1) - old_logits.log_softmax(-1)).exp().flip(-1)  # keep, drop
    return -(sums[0] * ratio.clamp(max=HIGH) + sums[1] * ratio.clamp(min=LOW)).sum()
