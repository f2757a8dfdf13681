"""The loss of a sample: every term of its draws by the likelihood that belongs to it."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.ops.policy_loss import combination_policy_loss
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
    if term.likelihood == "plackett_luce":
        rows = term.actions.shape[1]
        scores, old = scores.reshape(rows, -1), old.reshape(rows, -1)
    return combination_policy_loss(
        scores, old, term.actions, rewards, balanced=term.balanced, likelihood=term.likelihood,
        eps_low=config.eps_low, eps_high=config.eps_high, kl_weight=config.kl_weight,
    )  # fmt: skip
