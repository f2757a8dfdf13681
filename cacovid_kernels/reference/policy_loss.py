"""Specification of the policy loss: masks as words, sums over combinations, and the terms of every token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LANES = 32  # running sums of rewards


def pack_masks(masks: Tensor) -> Tensor:
    """`[R, N]` bool or integers -> `[R, ceil(N / 32)]` int32: bit i % 32 of word i / 32 says that mask i is not 0."""
    r, n = masks.shape
    bits = torch.zeros(r, -(-n // 32) * 32, dtype=torch.int64, device=masks.device)
    bits[:, :n] = masks != 0
    words = (bits.view(r, -1, 32) << torch.arange(32, device=masks.device)).sum(-1)  # [R, W]
    return words.to(torch.int32)  # modulo 2^32


def pack_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """`[R, K]` int64 -> `[R, ceil(num_tokens / 32)]`; what lies outside [0, num_tokens) marks nothing."""
    inside = (indices >= 0) & (indices < num_tokens)
    mask = torch.zeros(indices.shape[0], num_tokens + 1, dtype=torch.bool, device=indices.device)
    return pack_masks(mask.scatter_(1, torch.where(inside, indices, num_tokens), True)[:, :num_tokens])


def unpack_masks(words: Tensor, num_tokens: int) -> Tensor:
    """`[..., W]` int32 -> `[..., num_tokens]` bool."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1  # [..., W, 32]
    return bits.flatten(-2)[..., :num_tokens].bool()


def _lane_sum(x: Tensor) -> Tensor:
    """`[B, G]` -> `[B, 1]`: number g goes to running sum g % 32, then halves of the sums are added."""
    lanes = torch.zeros(x.shape[0], LANES, dtype=x.dtype, device=x.device)
    for chunk in x.split(LANES, dim=1):
        lanes[:, : chunk.shape[1]] += chunk
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes


def _sqrt(x: Tensor) -> Tensor:
    """The float64 nearest to the root, which `torch.sqrt` on a CPU misses by a unit in one case of a hundred."""
    return x.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(x.numpy()))


def advantages(rewards: Tensor) -> Tensor:
    """`[B, G]` -> float64 `[B, G]`: rewards minus their mean in units of the sample standard deviation + 1e-4."""
    x = rewards.double()
    g = x.shape[1]
    mean = _lane_sum(x) / g
    deviation = _sqrt(_lane_sum((x - mean) * (x - mean)) / max(g - 1, 1))
    return (x - mean) / (deviation + 1e-4)


def policy_sums(words: Tensor, rewards: Tensor, num_tokens: int, balanced: bool) -> Tensor:
    """`[B, G, W]` words, `[B, G]` rewards -> float64 `[B, 6, N]`, over the combinations that keep (drop) a token:
    weighted advantages above zero (rows 0 and 2), the others (1 and 3), weights (4 and 5)."""
    b, g = rewards.shape
    n = num_tokens
    advantage = advantages(rewards)  # [B, G]
    mask = unpack_masks(words.view(b, g, -(-n // 32)), n)  # [B, G, N]
    if balanced:
        count = mask.sum(-1).double()  # [B, G]
        share = count / n
        total = (count * (1.0 - share) + (n - count) * share + 1e-7) * g
        weights = (1.0 - share) / total, share / total
    else:
        weights = (torch.full_like(advantage, 1.0 / (n * g)),) * 2
    sums = torch.zeros(b, 6, n, dtype=torch.float64, device=words.device)
    for i in range(g):  # in this order: the same bits on every backend
        better = advantage[:, i, None] > 0.0  # [B, 1]
        for action, weight in enumerate(weights):
            chosen = mask[:, i] if action == 0 else ~mask[:, i]  # [B, N]
            earned = weight[:, i, None] * advantage[:, i, None]
            sums[:, 2 * action] += torch.where(chosen & better, earned, 0.0)
            sums[:, 2 * action + 1] += torch.where(chosen & ~better, earned, 0.0)
            sums[:, 4 + action] += torch.where(chosen, weight[:, i, None], 0.0)
    return sums


def log_odds(logits: Tensor) -> Tensor:
    """`[B, N]`, or `[B, N, 2]` logits of drop and keep, -> float64 `[B, N]`: ln of P(keep) / P(drop)."""
    wide = logits.double()
    return wide if wide.dim() == 2 else wide[..., 1] - wide[..., 0]


def policy_loss(
    logits: Tensor, old_logits: Tensor, sums: Tensor, eps_low: float, eps_high: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """The mean over B of the loss, and its gradient by `logits`; both float64 for float64 logits, else float32."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    odds, old_odds = log_odds(logits), log_odds(old_logits)  # [B, N]
    loss, gradient = torch.zeros_like(odds), torch.zeros_like(odds)
    for action, sign in enumerate((1.0, -1.0)):  # keep, drop
        log_p, old_log_p = (torch.nn.functional.logsigmoid(sign * x) for x in (odds, old_odds))
        p = log_p.exp()
        # Infinite ratios become finite: no combinations, a sum of zero, must not make them NaN.
        ratio = (log_p - old_log_p).exp().clamp(max=1e300)
        better, worse, weight = sums[:, 2 * action], sums[:, 2 * action + 1], sums[:, 4 + action]
        loss -= better * ratio.clamp(max=1 + eps_high) + worse * ratio.clamp(min=1 - eps_low)
        by_log_p = -(
            better * torch.where(ratio > 1 + eps_high, 0.0, ratio)
            + worse * torch.where(ratio < 1 - eps_low, 0.0, ratio)
        )
        if kl_weight != 0.0:
            half_by_p = (0.5 / p).clamp(max=1e300)
            log_half_p = 0.6931471805599453 + log_p.clamp(min=-1e200)
            loss += kl_weight * weight * (half_by_p + log_half_p - 1.0)
            by_log_p += kl_weight * weight * (1.0 - half_by_p)
        gradient += by_log_p * sign * (-sign * odds).sigmoid()
    gradient = gradient / odds.shape[0]
    if logits.dim() == 3:
        gradient = torch.stack([-gradient, gradient], -1)
    return (loss.sum() / odds.shape[0]).to(dtype), gradient.to(dtype)


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
    """`policy_loss` for the `policy_sums` of these combinations."""
    sums = policy_sums(words, rewards, logits.shape[1], balanced)
    return policy_loss(logits, old_logits, sums, eps_low, eps_high, kl_weight)


def policy_loss_backward(grad: Tensor, gradient: Tensor, logits: Tensor) -> Tensor:
    """The gradient by `logits` times what reached the loss, in the dtype of `logits`."""
    return (gradient * grad).to(logits.dtype)
