"""Which combinations of tokens are tried, and by which likelihood their rewards teach the policy.

A sampler is a function `(Scene, keep_ratio, step, config) -> Draw`. What it drew goes to the frozen model
(`Draw.kept`); how the policy learns from the rewards is said by `Draw.terms`, each of which names the loss that
belongs to the way it was drawn (`losses.term_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels.compressors.density import density_peaks
from cacovid_kernels.ops.combinations import sample_combinations
from cacovid_kernels.ops.sample import gumbel_topk
from cacovid_kernels.training.config import TrainConfig


class Scene(NamedTuple):
    """One video before it is compressed, with the scores from which combinations are drawn."""

    tokens: Tensor  # [N] float32
    frames: Tensor  # [T] float32
    features: Tensor  # [N, D]
    grid: tuple[int, int, int]


class Term(NamedTuple):
    """Some combinations of a draw, as one part of the loss sees them."""

    head: str  # whose scores were drawn from: "tokens" or "frames"
    likelihood: str  # "actions": keep or drop, token by token; "plackett_luce": the ordered draw
    actions: Tensor  # `pack_masks` words [g, n / 32], or [g, R, k] int64 items per row of scores as drawn, -1 padding
    balanced: bool = False  # kept and dropped tokens weigh the same ("actions" alone)

    def followed_by(self, later: Term) -> Term:
        """The same term with a later draw's combinations after its own."""
        both = [self.actions, later.actions]
        width = max(x.shape[-1] for x in both)
        if self.likelihood == "plackett_luce":  # the keep ratio may have changed in between
            both = [F.pad(x, (0, width - x.shape[-1]), value=-1) for x in both]
        return self._replace(actions=torch.cat(both))


class Draw(NamedTuple):
    """Combinations of one video; the first term is the one whose accuracy tells how hard the sample is."""

    kept: Tensor  # [G, K] int64 ascending positions of the tokens that the model gets to see, -1 padding
    rows: dict[str, slice]  # the rows of `kept` by how they were made
    terms: dict[str, Term]  # what the policy learns from, each from the rows of its name


def draw_combinations(scene: Scene, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """The paper's space: by content, by groups of tokens, by frames and the content inside them.

    Source: CaCoVID (arXiv 2602.01649), published `dynamic_sample_for_training`.
    """
    t, h, w = scene.grid
    found = sample_combinations(
        scene.tokens, scene.frames, [scene.grid], num_samples=config.num_token, keep_ratio=keep_ratio,
        group_size=config.group_size, max_group_prob=config.max_group_prob, num_frame_samples=config.num_frame,
        frame_ratio=_frame_ratio(config.frame_ratio, keep_ratio, scene.grid), seed=config.seed, step=step,
        mode=config.mode,
    )  # fmt: skip
    total = found.lengths[0]
    parts = {"token": found.indices}
    terms = {"token": Term("tokens", "actions", found.packed_mask(), balanced=True)}
    if config.num_frame:
        parts["frame"] = _content_of_frames(scene, found.frame_indices.clamp(min=0), total)
        terms["frame"] = Term("frames", "actions", found.packed_frame_mask())
    if config.num_content:
        peaks = density_peaks(scene.features.reshape(t, h * w, -1), total // t)  # [t, k]
        flat = peaks + torch.arange(0, t * h * w, h * w, device=peaks.device)[:, None]
        parts["content"] = flat.reshape(1, total).expand(config.num_content, total)
    rows, first = {}, 0
    for name, part in parts.items():
        rows[name] = slice(first, first + len(part))
        first += len(part)
    return Draw(torch.cat(list(parts.values())), rows, terms)


def draw_gumbel(scene: Scene, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """Every frame's tokens without replacement, by the softmax of their scores."""
    t, h, w = scene.grid
    return _plain_draw(scene.tokens.reshape(t, h * w), keep_ratio, step, config)


def draw_gumbel_video(scene: Scene, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """Tokens of the whole video without replacement, by the softmax of their scores."""
    return _plain_draw(scene.tokens[None], keep_ratio, step, config)


SAMPLERS: dict[str, Callable[[Scene, float, int, TrainConfig], Draw]] = {
    "combinations": draw_combinations,
    "gumbel": draw_gumbel,
    "gumbel_video": draw_gumbel_video,
}


def trained_heads(config: TrainConfig) -> set[str]:
    """The heads of the policy that get a gradient: of "tokens" and "frames"."""
    return {"tokens", "frames"} if config.sampler == "combinations" and config.num_frame else {"tokens"}


def _frame_ratio(frame_ratio: float, keep_ratio: float, grid: tuple[int, int, int]) -> float:
    """At least as many frames as hold the tokens of one combination."""
    t, h, w = grid
    needed = math.ceil(max(round(keep_ratio * h * w), 1) * t / (h * w))
    return max(frame_ratio, min(needed / t, 1.0))


def _content_of_frames(scene: Scene, frames: Tensor, total: int) -> Tensor:
    """`[Gf, KF]` frames -> `[Gf, total]` ascending positions: the density peaks of their tokens together."""
    _, h, w = scene.grid
    inside = torch.arange(h * w, device=frames.device)
    positions = (frames[:, :, None] * (h * w) + inside).flatten(1)  # [Gf, KF * h * w]
    return positions.gather(1, density_peaks(scene.features[positions], total))


def _plain_draw(logits: Tensor, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """`[R, P]` scores -> one draw from every row, told apart by their order."""
    rows, size = logits.shape
    k = max(round(keep_ratio * size), 1)
    drawn = gumbel_topk(logits, k, num_samples=config.num_combinations, seed=config.seed, step=step).indices
    first = torch.arange(0, rows * size, size, device=drawn.device)[:, None]
    flat = torch.where(drawn < 0, -1, drawn + first).flatten(1)  # [G, R * k]
    rows_of_draw = {"token": slice(0, len(flat))}
    return Draw(flat.sort(1).values, rows_of_draw, {"token": Term("tokens", "plackett_luce", drawn)})
