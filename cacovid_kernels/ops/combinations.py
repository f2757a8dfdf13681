"""Online combination space sampling: groups of tokens and of frames to try in policy optimisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cacovid_kernels._library import Op
from cacovid_kernels.combinations import Combinations
from cacovid_kernels.ops._checks import (
    Grid,
    check_choice,
    check_same_device,
    check_scores,
    describe,
    parse_grid,
)
from cacovid_kernels.ops._draws import check_key, check_samples
from cacovid_kernels.reference.combinations import group_cap
from cacovid_kernels.selection import raise_if_flagged

_OP = "sample_combinations"


def _fake(token_scores, frame_scores, grid_thw, num_samples, num_draw, groups, cap, num_frame_samples, num_frames, *_):
    counts = grid_thw[::3]
    frames, drawn = sum(counts), sum(t * k for t, k in zip(counts, num_draw, strict=True))
    return (
        token_scores.new_empty(num_samples, drawn, dtype=torch.int64),
        token_scores.new_empty(num_samples, frames, dtype=torch.int64),
        token_scores.new_empty(num_samples, frames, dtype=torch.float32),
        token_scores.new_empty(num_frame_samples, sum(num_frames), dtype=torch.int64),
        token_scores.new_empty(num_frame_samples, len(num_draw), dtype=torch.float32),
        token_scores.new_empty(frames, dtype=torch.int32),
        token_scores.new_empty(len(num_draw) if num_frame_samples > 0 else 0, dtype=torch.int32),
    )


_sample_combinations = Op(
    "combinations",
    "sample_combinations(Tensor token_scores, Tensor? frame_scores, SymInt[] grid_thw, SymInt num_samples, "
    "SymInt[] num_draw, SymInt[] num_groups, float max_group_prob, SymInt num_frame_samples, SymInt[] num_frames, "
    "bool strict, SymInt seed, SymInt step, Tensor? added_steps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


class _Space(NamedTuple):
    """What the host knows about every video before it sees a score."""

    grid: list[int]
    tokens: int  # of all videos
    frames: int
    per_frame: int  # tokens of every frame; 0 if videos differ
    num_draw: list[int]  # tokens from every frame
    num_groups: list[int]
    num_frames: list[int]  # frames of a frame combination
    lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]


def _video_space(
    h: int, w: int, keep_ratio: float, group_size: float, max_group_prob: float, strict: bool
) -> tuple[int, int]:
    """Tokens to draw per frame, and groups. The order of products is the published one."""
    tokens = h * w
    draw = round(keep_ratio * h * w)
    groups = max(int(1 / keep_ratio / group_size), 1)
    if strict:
        draw = max(draw, 1)
        groups = min(groups, tokens // draw)
    elif draw < 1:
        raise ValueError(
            f"{_OP}: keep_ratio={keep_ratio} draws no token from a frame of {h} x {w}. "
            f'Raise it, or pass mode="strict", which draws at least one.'
        )
    elif groups > tokens or tokens // groups < draw:
        raise ValueError(
            f"{_OP}: group_size={group_size} leaves groups of {tokens // groups} tokens (frames of {h} x {w}), fewer "
            f'than the {draw} to draw. Raise it, or pass mode="strict", which makes fewer groups.'
        )
    cap = group_cap(groups, max_group_prob)
    if groups > 1 and cap * groups <= 1.0:
        raise ValueError(
            f"{_OP}: max_group_prob={max_group_prob} caps {groups} groups at {cap:g} each, which is no more than 1 "
            f"in all. Raise it above 1."
        )
    return draw, groups


def _parse_space(
    grid: Grid, keep_ratio: float, group_size: float, max_group_prob: float, frame_ratio: float, strict: bool
) -> _Space:
    for name, value, most in (
        ("keep_ratio", keep_ratio, 1.0),
        ("frame_ratio", frame_ratio, 1.0),
        ("group_size", group_size, math.inf),
        ("max_group_prob", max_group_prob, math.inf),
    ):
        if not 0.0 < value <= most:
            rule = "in (0, 1]" if most == 1.0 else "positive"
            raise ValueError(f"{_OP}: {name}={value} must be {rule}.")
    found = [_video_space(h, w, keep_ratio, group_size, max_group_prob, strict) for _, h, w in grid]
    num_frames = [max(math.ceil(t * frame_ratio), 1) for t, _, _ in grid]
    first = grid[0][1] * grid[0][2] if grid else 0
    return _Space(
        grid=[n for video in grid for n in video],
        tokens=sum(t * h * w for t, h, w in grid),
        frames=sum(t for t, _, _ in grid),
        per_frame=first if all(h * w == first for _, h, w in grid) else 0,
        num_draw=[draw for draw, _ in found],
        num_groups=[groups for _, groups in found],
        num_frames=num_frames,
        lengths=tuple(t * draw for (t, _, _), (draw, _) in zip(grid, found, strict=True)),
        frame_lengths=tuple(num_frames),
    )


_cached_space = lru_cache(maxsize=256)(_parse_space)


def sample_combinations(
    token_scores: Tensor,
    frame_scores: Tensor | None = None,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    num_samples: int,
    keep_ratio: float,
    group_size: float = 2.0,
    max_group_prob: float = 2.0,
    num_frame_samples: int = 0,
    frame_ratio: float = 0.125,
    seed: int,
    step: int | Tensor = 0,
    mode: str = "strict",
    check: str = "flag",
) -> Combinations:
    """Samples combinations of tokens, and of frames, for policy optimisation: all videos in one call.

    From every frame round(keep_ratio * tokens) tokens are drawn, all from one group: the frame's tokens, ranked by
    score, fall into int(1 / (keep_ratio * group_size)) groups. A group is drawn by its share of the frame's softmax,
    at least 1/groups^2 and at most max_group_prob / groups (within [0.1, 0.9]); tokens inside it are drawn without
    replacement, by probabilities clamped to [1/2, 2] of uniform. Frame combinations hold ceil(frame_ratio * frames)
    frames, drawn without replacement by the softmax of their scores. The first of each kind is the plain top-k.

    Args:
        token_scores: `[N]` packed over all videos, `[T, P]` or `[B, T, P]`; float32, bfloat16 or float16. Tokens
            at -inf or NaN are never drawn, and groups with too few others are not either.
        frame_scores: `[F]` or `[B, T]`; only for frame combinations.
        grid_thw: (frames, rows, columns) per video after any spatial merge, on the host. Not needed for dense
            scores.
        num_samples: token combinations G, the top-k included, in [1, 2^24].
        keep_ratio: share of every frame's tokens that a combination holds, in (0, 1].
        group_size: tokens of a group per token drawn, about.
        max_group_prob: cap of a group's probability, as a multiple of the uniform one; above 1.
        num_frame_samples: frame combinations Gf, the top-k included; 0 for none.
        frame_ratio: share of the frames that a frame combination holds, in (0, 1].
        seed: 64 bits, any integer in [-2^63, 2^64).
        step: number of the training step, in [0, 2^32); or one int64 on the device of the scores, which is read
            there (modulo 2^32): a captured CUDA graph draws afresh when it has changed. The noise of a token depends
            on seed, step, sample, video and its place in the video alone.
        mode: "strict" draws at least one token per frame, makes fewer groups where they would hold fewer tokens
            than are drawn, and caps a frame's probability at 3 / frames. "official" reproduces the published
            distribution: it refuses such groups, from which the published code draws tokens of probability zero,
            and floors frame probabilities at 1 / Gf^2 without a cap, because the published one acts on all Gf rows
            as a whole; where it would act at all, that code indexes out of range or makes a row uniform.
        check: "flag" records odd scores in `Combinations.status`; "raise" makes them an error, at the price of a
            synchronisation on a GPU.

    Returns:
        `Combinations`, without gradients. Its sizes are known on the host.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> scores = torch.arange(32.0).reshape(2, 16)
        >>> drawn = ck.sample_combinations(scores, num_samples=3, keep_ratio=0.125, seed=0)
        >>> drawn.indices[0], drawn.mask().sum(1)
        (tensor([14, 15, 30, 31]), tensor([4, 4, 4]))

    Source: CaCoVID (arXiv 2602.01649), online combination space sampling; published `sample_token`,
    `sample_without_replacement_h`, `grouped_sample` and `sample_frame`.
    """
    check_scores(_OP, "token_scores", token_scores)
    check_choice(_OP, "mode", mode, ("official", "strict"))
    check_choice(_OP, "check", check, ("flag", "raise"))
    num_samples = check_samples(_OP, "num_samples", num_samples, 1)
    num_frame_samples = check_samples(_OP, "num_frame_samples", num_frame_samples, 0)
    seed, step, added_steps, _ = check_key(_OP, seed, step, token_scores.device)
    grid = parse_grid(_OP, grid_thw, token_scores)
    strict = mode == "strict"
    parse = _parse_space if torch.compiler.is_compiling() else _cached_space
    ratios = float(keep_ratio), float(group_size), float(max_group_prob), float(frame_ratio)
    space = parse(grid, *ratios, strict)
    if token_scores.numel() != space.tokens or not 1 <= token_scores.dim() <= 3:
        raise ValueError(
            f"{_OP}: token_scores must hold one score for each of the {space.tokens} tokens of "
            f"grid_thw={list(grid)} (token_scores: {describe(token_scores)}). Pass [N], [T, P] or [B, T, P]."
        )
    if num_frame_samples == 0:
        frame_scores = None
    elif frame_scores is None:
        raise ValueError(f"{_OP}: num_frame_samples={num_frame_samples} needs frame_scores. Pass them, or 0.")
    else:
        frame_scores = _check_frames(frame_scores, token_scores, space.frames)
    token_scores = token_scores.detach() if token_scores.requires_grad else token_scores
    if token_scores.dim() > 1 and token_scores.shape[-1] != space.per_frame:
        token_scores = token_scores.reshape(-1)  # dense, but not in rows of one frame
    indices, groups, log_prob, frame_indices, frame_log_prob, frame_status, frame_draw_status = _sample_combinations(
        token_scores, frame_scores, space.grid, num_samples, space.num_draw, space.num_groups, ratios[2],
        num_frame_samples, space.num_frames, strict, seed, step, added_steps,
    )  # fmt: skip
    found = Combinations(
        indices, groups, log_prob, frame_indices, frame_log_prob, frame_status, frame_draw_status,
        space.lengths, space.frame_lengths, grid,
    )  # fmt: skip
    if check == "raise":
        raise_if_flagged(_OP, found.status, "video")
    return found


def _check_frames(frame_scores: Tensor, token_scores: Tensor, frames: int) -> Tensor:
    check_scores(_OP, "frame_scores", frame_scores)
    check_same_device(_OP, "frame_scores", frame_scores, "token_scores", token_scores)
    if frame_scores.numel() != frames or not 1 <= frame_scores.dim() <= 2:
        raise ValueError(
            f"{_OP}: frame_scores must hold one score for each of the {frames} frames of grid_thw "
            f"(frame_scores: {describe(frame_scores)}). Pass [F], or [B, T] for videos of equal length."
        )
    return frame_scores.detach() if frame_scores.requires_grad else frame_scores
