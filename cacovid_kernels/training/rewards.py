"""What a combination of tokens earns: how well the frozen model answers from them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cacovid_kernels.samples import Sample


class Attempts(NamedTuple):
    """The frozen model's answers to one question, one per combination of tokens."""

    sample: Sample
    kept: Tensor  # [G, K] int64 positions in the video, -1 padding
    answer: Tensor  # [A] int64, the right answer's token ids
    logits: Tensor | None  # [G, A, V]: what it would say next, after the prompt and the right answer so far
    texts: list[str] | None  # what it said, where it had to speak


def exact_answer(attempts: Attempts) -> Tensor:
    """`[G]`, 1 where greedy decoding gives the right answer token for token.

    One forward tells: as long as every earlier token is right, what greedy decoding says next is the largest logit
    after the right answer so far.
    """
    assert attempts.logits is not None
    return (attempts.logits.argmax(-1) == attempts.answer).all(-1).float()


def answer_log_prob(attempts: Attempts) -> Tensor:
    """`[G]`, mean log-probability of the right answer's tokens, in nats."""
    assert attempts.logits is not None
    log_prob = attempts.logits.float().log_softmax(-1)  # [G, A, V]
    answer = attempts.answer[None, :, None].expand(len(log_prob), -1, 1)
    return log_prob.gather(-1, answer).squeeze(-1).mean(-1)


def same_text(attempts: Attempts) -> Tensor:
    """`[G]`, 1 where the text is the right answer but for case, outer space and a full stop."""
    assert attempts.texts is not None
    right = _plain(attempts.sample.answer)
    return torch.tensor([float(_plain(text) == right) for text in attempts.texts], device=attempts.kept.device)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()


class Reward(NamedTuple):
    """How combinations are rewarded.

    Attributes:
        function: `Attempts` -> `[G]` float.
        accuracy: `Attempts` -> `[G]` in [0, 1], which tells easy samples from hard ones.
        speaks: the model generates texts; otherwise one forward gives logits for the right answer.
    """

    function: Callable[[Attempts], Tensor]
    accuracy: Callable[[Attempts], Tensor]
    speaks: bool = False


REWARDS = {
    "exact": Reward(exact_answer, exact_answer),
    "log_prob": Reward(answer_log_prob, exact_answer),
    "generated": Reward(same_text, same_text, speaks=True),
}
