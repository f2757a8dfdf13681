"""The loss of a sample: every term of its draws by the likelihood that belongs to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cacovid_kernels.ops.sample import pl_log_prob
from cacovid_kernels.policy import PolicyScores
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.memory import Memory
from cacovid_kernels.training.samplers import Term


def sample_loss(scores: PolicyScores, old: PolicyScores, memory: Memory, config: TrainConfig) -> Tensor:
    """Scalar loss of one sample over all combinations drawn for it so far.

    Args:
        scores: of this sample alone, as the policy gives them now.
        old: the same before the first of the sample's optimisation steps, from which its combinations were drawn.
        memory: combinations and rewards.
    """
    losses = [
        term_loss(getattr(scores, term.head), getattr(old, term.head), term, memory.rewards[name], config)
        for name, term in memory.terms.items()
    ]
    return torch.stack(losses).sum()


def term_loss(scores: Tensor, old: Tensor, term: Term, rewards: Tensor, config: TrainConfig) -> Tensor:
    """Scalar loss of one term; scores and old scores are `[n]`, log-odds of keeping."""
    std = rewards.std() if len(rewards) > 1 else torch.zeros_like(rewards[0])
    advantage = ((rewards - rewards.mean()) / (std + 1e-4))[:, None]
    if term.likelihood == "plackett_luce":
        rows = term.actions.shape[1]
        new_lp = pl_log_prob(scores.reshape(rows, -1), term.actions)  # [g, R]
        old_lp = pl_log_prob(old.reshape(rows, -1), term.actions)
        return _clipped((new_lp - old_lp).exp(), advantage, config).mean()
    sign = torch.where(term.actions, 1.0, -1.0)
    logp = torch.nn.functional.logsigmoid(sign * scores)
    old_logp = torch.nn.functional.logsigmoid(sign * old)
    loss = _clipped((logp - old_logp).exp(), advantage, config)
    gap = math.log(0.5) - logp
    loss = loss + config.kl_weight * (gap.exp() - gap - 1)
    if not term.balanced:
        return loss.mean()
    m = term.actions.float()
    share = m.mean(1, keepdim=True)
    weight = m * (1 - share) + (1 - m) * share
    return ((loss * weight).sum(1) / (weight.sum(1) + 1e-7)).mean()


def _clipped(ratio: Tensor, advantage: Tensor, config: TrainConfig) -> Tensor:
    clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)
