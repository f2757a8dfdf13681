"""What the repeated draws of one sample leave behind: combinations, rewards, and how hard the sample is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.samplers import Draw, Term


def adapted_keep_ratio(keep_ratio: float, accuracy: float, config: TrainConfig) -> float:
    """The keep ratio of the next draw: easy samples get less to see, hard ones more, within limits.

    Args:
        keep_ratio: of the last draw.
        accuracy: mean accuracy of the sample's token combinations so far.

    Source: CaCoVID, published `_inner_training_loop`.
    """
    if accuracy >= config.easy_accuracy:
        return max(keep_ratio / 2, min(config.min_keep_ratio, config.keep_ratio))
    if accuracy <= config.hard_accuracy:
        return min(keep_ratio * 2, max(config.max_keep_ratio, config.keep_ratio))
    return keep_ratio


@dataclass
class Memory:
    """All combinations drawn for one sample, by term of the loss, with their rewards."""

    keep_ratio: float
    terms: dict[str, Term] = field(default_factory=dict)
    rewards: dict[str, Tensor] = field(default_factory=dict)  # [g] float32
    correct: float = 0.0  # sums over the combinations of the first term, on the host
    attempts: int = 0

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the token combinations so far, of which there must be some."""
        return self.correct / self.attempts

    def add(self, draw: Draw, rewards: Tensor, accuracy: list[float]) -> None:
        """Append one draw.

        Args:
            draw: the combinations.
            rewards: `[G]`, one per combination.
            accuracy: the same combinations' accuracy, on the host.
        """
        for name, term in draw.terms.items():
            earned = rewards[draw.rows[name]]
            if name in self.terms:
                term = self.terms[name].followed_by(term)
                earned = torch.cat([self.rewards[name], earned])
            self.terms[name], self.rewards[name] = term, earned
        first = accuracy[draw.rows[next(iter(draw.terms))]]
        self.correct += sum(first)
        self.attempts += len(first)
