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

_FRAMES = 0x9E3779B97F4A7C15  # apart from the seed of the tokens' noise


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
    """The paper's space: tokens by groups of similar scores, frames likewise, content.

    Source: CaCoVID (arXiv 2602.01649), published `dynamic_sample_for_training`.
    """
    found = sample_combinations(
        scene.tokens, scene.frames, [scene.grid], num_samples=config.num_token, keep_ratio=keep_ratio,
        group_size=config.group_size, max_group_prob=config.max_group_prob, num_frame_samples=config.num_frame,
        frame_ratio=_frame_ratio(config.frame_ratio, keep_ratio, scene.grid), seed=config.seed, step=step,
        mode=config.mode,
    )  # fmt: skip
    token = Term("tokens", "actions", found.packed_mask(), balanced=True)
    frame = (found.frame_indices, Term("frames", "actions", found.packed_frame_mask())) if config.num_frame else None
    return _draw(scene, found.indices, token, frame, config)


def draw_gumbel(scene: Scene, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """Every frame's tokens without replacement, by the softmax of their scores; frames likewise, content."""
    t, h, w = scene.grid
    return _without_replacement(scene, scene.tokens.reshape(t, h * w), keep_ratio, step, config)


def draw_gumbel_video(scene: Scene, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """The same, but the tokens of the whole video together: a frame may give many or none."""
    return _without_replacement(scene, scene.tokens[None], keep_ratio, step, config)


SAMPLERS: dict[str, Callable[[Scene, float, int, TrainConfig], Draw]] = {
    "combinations": draw_combinations,
    "gumbel": draw_gumbel,
    "gumbel_video": draw_gumbel_video,
}


def trained_heads(config: TrainConfig) -> set[str]:
    """The heads of the policy that get a gradient: of "tokens" and "frames"."""
    return {"tokens", "frames"} if config.num_frame else {"tokens"}


def _tokens_per_frame(keep_ratio: float, grid: tuple[int, int, int]) -> int:
    _, h, w = grid
    return max(round(keep_ratio * h * w), 1)


def _frame_ratio(frame_ratio: float, keep_ratio: float, grid: tuple[int, int, int]) -> float:
    """At least as many frames as hold the tokens of one combination."""
    t, h, w = grid
    needed = math.ceil(_tokens_per_frame(keep_ratio, grid) * t / (h * w))
    return max(frame_ratio, min(needed / t, 1.0))


def _without_replacement(scene: Scene, logits: Tensor, keep_ratio: float, step: int, config: TrainConfig) -> Draw:
    """Ordered draws from every row of `logits` `[R, P]`, as many tokens in all as `draw_combinations` takes."""
    t, _, _ = scene.grid
    rows, size = logits.shape
    total = _tokens_per_frame(keep_ratio, scene.grid) * t
    drawn = gumbel_topk(logits, total // rows, num_samples=config.num_token, seed=config.seed, step=step).indices
    first = torch.arange(0, rows * size, size, device=drawn.device)[:, None]
    flat = torch.where(drawn < 0, -1, drawn + first).flatten(1)  # [num_token, R * k]
    frame = None
    if config.num_frame:
        count = max(math.ceil(t * _frame_ratio(config.frame_ratio, keep_ratio, scene.grid)), 1)
        seed = config.seed ^ _FRAMES  # noise of its own
        frames = gumbel_topk(scene.frames[None], count, num_samples=config.num_frame, seed=seed, step=step).indices
        frame = (frames[:, 0].sort(1).values, Term("frames", "plackett_luce", frames))
    return _draw(scene, flat.sort(1).values, Term("tokens", "plackett_luce", drawn), frame, config)


def _draw(scene: Scene, tokens: Tensor, token: Term, frame: tuple[Tensor, Term] | None, config: TrainConfig) -> Draw:
    """The drawn `tokens` `[g, K]`, the content of the drawn frames, and the content of every frame."""
    t, h, w = scene.grid
    total = tokens.shape[1]
    parts, terms = {"token": tokens}, {"token": token}
    if frame is not None:
        frames, terms["frame"] = frame
        parts["frame"] = _content_of_frames(scene, frames.clamp(min=0), total)
    if config.num_content:
        peaks = density_peaks(scene.features.reshape(t, h * w, -1), total // t)  # [t, k]
        flat = peaks + torch.arange(0, t * h * w, h * w, device=peaks.device)[:, None]
        parts["content"] = flat.reshape(1, total).expand(config.num_content, total)
    rows, first = {}, 0
    for name, part in parts.items():
        rows[name] = slice(first, first + len(part))
        first += len(part)
    return Draw(torch.cat(list(parts.values())), rows, terms)


def _content_of_frames(scene: Scene, frames: Tensor, total: int) -> Tensor:
    """`[Gf, KF]` frames -> `[Gf, total]` ascending positions: the density peaks of their tokens together."""
    _, h, w = scene.grid
    inside = torch.arange(h * w, device=frames.device)
    positions = (frames[:, :, None] * (h * w) + inside).flatten(1)  # [Gf, KF * h * w]
    return positions.gather(1, density_peaks(scene.features[positions], total))
