"""Budgeted selection: tokens per frame, the best of every frame, a uniform fill."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from cacovid_kernels._library import Op
from cacovid_kernels.ops._checks import (
    Grid,
    check_choice,
    check_same_device,
    check_scores,
    describe,
    host_ints,
    is_one_int,
    parse_budget,
    parse_grid,
)
from cacovid_kernels.ops._kept import check_tokens, select_kept
from cacovid_kernels.ops.gather import gather_tokens
from cacovid_kernels.selection import Layout, Selection, frames_of, raise_if_flagged, status_of_videos

_BUDGET = (
    "SymInt[] grid_thw, SymInt[] num_keep, float? keep_ratio, float importance_ratio, "
    "float? max_frame_ratio, bool strict"
)


def _fake_allocate(frame_scores, grid_thw, num_keep, *_):
    counts = frame_scores.new_empty(sum(grid_thw[::3]), dtype=torch.int64)
    return counts, frame_scores.new_empty(sum(grid_thw[::3]), dtype=torch.int32)


def _fake_select(token_scores, frame_scores, grid_thw, num_keep, *_):
    indices = token_scores.new_empty(sum(num_keep), dtype=torch.int64)
    counts = token_scores.new_empty(sum(grid_thw[::3]), dtype=torch.int64)
    return indices, counts, token_scores.new_empty(sum(grid_thw[::3]), dtype=torch.int32)


def _fake_topk(scores, cu_seqlens, k, by_score):
    return scores.new_empty(sum(k), dtype=torch.int64), scores.new_empty(len(k), dtype=torch.int32)


_allocate_budget = Op("select", f"allocate_budget(Tensor frame_scores, {_BUDGET}) -> (Tensor, Tensor)", _fake_allocate)
_select_tokens = Op(
    "select",
    f"select_tokens(Tensor token_scores, Tensor? frame_scores, {_BUDGET}, bool fill, bool by_score) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_select,
)
_segmented_topk = Op(
    "select",
    "segmented_topk(Tensor scores, SymInt[] cu_seqlens, SymInt[] k, bool by_score) -> (Tensor, Tensor)",
    _fake_topk,
)


def _check_frames(op: str, frame_scores: Tensor, frames: int) -> None:
    check_scores(op, "frame_scores", frame_scores)
    if frame_scores.numel() != frames or not 1 <= frame_scores.dim() <= 2:
        raise ValueError(
            f"{op}: frame_scores must hold one score for each of the {frames} frames of grid_thw "
            f"(frame_scores: {describe(frame_scores)}). Pass [F], or [B, T] for videos of equal length."
        )


def allocate_budget(
    frame_scores: Tensor,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | Sequence[int] | None = None,
    importance_ratio: float = 0.5,
    max_frame_ratio: float | None = None,
    mode: str = "official",
    check: str = "flag",
) -> Tensor:
    """Divides each video's score-ranked tokens among its frames by their importance.

    The total is exact: floor(importance_ratio * keep_ratio * tokens). A frame's share is the softmax of its
    score scaled to [-3, 3], clipped; rounding errors are then levelled, one token at a time from the largest
    counts or to the smallest, which is computed as a water level in closed form.

    Args:
        frame_scores: `[F]` packed over all videos, or `[B, T]`; float32, bfloat16 or float16.
        grid_thw: (frames, rows, columns) per video, on the host.
        keep_ratio: share of tokens kept, in (0, 1]. Either this or `num_tokens`.
        num_tokens: tokens kept per video, one number or one per video.
        importance_ratio: share of the kept tokens that are chosen by score, in [0, 1].
        max_frame_ratio: most of a frame that may be kept, before the importance ratio; default 1.5 times the
            keep ratio.
        mode: "official" reproduces the published implementation, where levelling may exceed an infeasible cap;
            "strict" refuses a cap below the keep ratio.
        check: "flag" ignores odd values (-inf and NaN get the smallest share); "raise" makes them an error.

    Returns:
        `[F]` int64, tokens per frame.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> ck.allocate_budget(torch.tensor([0.0, 1.0, 2.0, 3.0]), [(4, 4, 4)], keep_ratio=0.25)
        tensor([2, 1, 2, 3])

    Source: CaCoVID (arXiv 2602.01649), published `sample_token_eval`.
    """
    op = "allocate_budget"
    if grid_thw is None:
        raise ValueError(f"{op}: grid_thw is needed. Pass (frames, rows, columns) per video.")
    grid = parse_grid(op, grid_thw, frame_scores)
    check_choice(op, "mode", mode, ("official", "strict"))
    check_choice(op, "check", check, ("flag", "raise"))
    strict = mode == "strict"
    b = parse_budget(op, grid, keep_ratio, num_tokens, importance_ratio, max_frame_ratio, strict)
    _check_frames(op, frame_scores, b.frames)
    frame_scores = frame_scores.detach() if frame_scores.requires_grad else frame_scores
    counts, frame_status = _allocate_budget(
        frame_scores, b.grid, b.num_keep, b.keep_ratio, float(importance_ratio), b.max_frame_ratio, strict
    )
    if check == "raise":
        raise_if_flagged(op, status_of_videos(frame_status, grid), "video")
    return counts


def select_tokens(
    token_scores: Tensor,
    frame_scores: Tensor | None = None,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | Sequence[int] | None = None,
    importance_ratio: float = 0.5,
    max_frame_ratio: float | None = None,
    fill: str = "uniform",
    order: str = "index",
    tokens: Tensor | None = None,
    layout: bool = False,
    mode: str = "official",
    check: str = "flag",
) -> Selection:
    """Chooses which video tokens to keep: a budget per frame, the best tokens of every frame, a uniform fill.

    Args:
        token_scores: `[N]` packed over all videos, `[T, P]` or `[B, T, P]`; float32, bfloat16 or float16,
            larger = kept first. Ties go to the lower index, -inf ranks after every finite score, NaN last.
        frame_scores: `[F]` or `[B, T]` importance of the frames; None gives every frame the same budget.
        grid_thw: (frames, rows, columns) per video after any spatial merge, on the host. Not needed for
            dense scores.
        keep_ratio: share of tokens kept, in (0, 1]; floor(keep_ratio * tokens), at least one, are kept.
        num_tokens: tokens kept per video instead of a ratio, one number or one per video.
        importance_ratio: share of the kept tokens chosen by score, in [0, 1]; the rest fill uniformly.
        max_frame_ratio: most of a frame that may be kept by score, before the importance ratio; default
            1.5 times the keep ratio.
        fill: "uniform" spreads the rest over the tokens that were not chosen; "none" leaves them out: only
            floor(importance_ratio * keep_ratio * tokens) are kept, or all `num_tokens` by score.
        order: "index" (time, then space) or "score" (falling score within each video).
        tokens: `[N, D]` what the scores belong to, of any real dtype: its kept rows come back as
            `Selection.tokens`, with a gradient; in CUDA C++ they are copied in the launch that selects.
        layout: also writes `Selection.mask()`, `positions()` and `cu_seqlens` now, in CUDA C++ in the same launch;
            else each is computed when it is asked for.
        mode: "official" reproduces the published evaluation index for index; "strict" refuses infeasible frame
            caps and spaces the fill by exact fractions.
        check: "flag" records odd scores in `Selection.status`; "raise" makes them an error, at the price of
            a synchronisation on a GPU.

    Returns:
        A `Selection` whose sizes are known on the host. Indices carry no gradient.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.7, 0.2]])
        >>> ck.select_tokens(scores, keep_ratio=0.5, importance_ratio=1.0).indices
        tensor([1, 3, 4, 6])

    Source: CaCoVID (arXiv 2602.01649), published `sample_token_eval` and `div_sample_eval`.
    """
    op = "select_tokens"
    check_scores(op, "token_scores", token_scores)
    options = _options if torch.compiler.is_compiling() else _known_options
    strict, uniform, by_score = options(op, mode, fill, order, check)
    grid = parse_grid(op, grid_thw, token_scores)
    b = parse_budget(op, grid, keep_ratio, num_tokens, importance_ratio, max_frame_ratio, strict, uniform)
    if token_scores.numel() != b.tokens or not 1 <= token_scores.dim() <= 3:
        raise ValueError(
            f"{op}: token_scores must hold one score for each of the {b.tokens} tokens of grid_thw={list(grid)} "
            f"(token_scores: {describe(token_scores)}). Pass [N], [T, P] or [B, T, P]."
        )
    if frame_scores is not None:
        _check_frames(op, frame_scores, b.frames)
        check_same_device(op, "frame_scores", frame_scores, "token_scores", token_scores)
        frame_scores = frame_scores.detach() if frame_scores.requires_grad else frame_scores
    # A number of tokens that nothing fills up is all chosen by score.
    importance = float(importance_ratio) if uniform or num_tokens is None else 1.0
    scores = _rows_of_frames(token_scores, grid)
    ratios = (b.keep_ratio, importance, b.max_frame_ratio, strict, uniform)
    kept_layout = None
    if tokens is not None:
        check_tokens(op, tokens, token_scores)
    if (tokens is not None or layout) and not by_score:
        indices, frame_counts, frame_status, *parts, rows = select_kept(
            scores, frame_scores, b.grid, b.num_keep, *ratios, tokens
        )
        kept_layout, tokens = Layout(*parts), None if tokens is None else rows
    else:
        indices, frame_counts, frame_status = _select_tokens(
            scores, frame_scores, b.grid, b.num_keep, *ratios, by_score
        )
        tokens = None if tokens is None else gather_tokens(tokens, indices, dim=0)
    if check == "raise":
        raise_if_flagged(op, status_of_videos(frame_status, grid), "video")
    return Selection(indices, frame_counts, frame_status, tuple(b.num_keep), grid, tokens, kept_layout)


def _options(op: str, mode: str, fill: str, order: str, check: str) -> tuple[bool, bool, bool]:
    check_choice(op, "fill", fill, ("uniform", "none"))
    check_choice(op, "order", order, ("index", "score"))
    check_choice(op, "mode", mode, ("official", "strict"))
    check_choice(op, "check", check, ("flag", "raise"))
    return mode == "strict", fill == "uniform", order == "score"


_known_options = lru_cache(maxsize=64)(_options)


def _rows_of_frames(scores: Tensor, grid: Grid) -> Tensor:
    """Detached scores; a dense shape whose last axis is not one frame becomes packed."""
    scores = scores.detach() if scores.requires_grad else scores
    if scores.dim() == 1 or all(h * w == scores.shape[-1] for _, h, w in grid):
        return scores
    return scores.reshape(-1)


def topk_tokens(
    token_scores: Tensor,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | Sequence[int] | None = None,
    order: str = "index",
    check: str = "flag",
) -> Selection:
    """Chooses the best tokens of every whole video, without a budget per frame: a frame may give all or none.

    For a policy trained by draws from the whole video (`sampler="gumbel_video"`), and any scorer whose scores compare
    across frames. A policy trained by draws from every frame ("gumbel", "combinations") takes a budget per frame:
    `select_tokens`.

    Args:
        token_scores: `[N]` packed over all videos, `[T, P]` or `[B, T, P]`; float32, bfloat16 or float16,
            larger = kept first. Ties go to the lower index, NaN ranks last.
        grid_thw: (frames, rows, columns) per video after any spatial merge, on the host. Not needed for
            dense scores.
        keep_ratio: share of tokens kept, in (0, 1]; floor(keep_ratio * tokens), at least one, are kept.
        num_tokens: tokens kept per video instead of a ratio, one number or one per video.
        order: "index" (time, then space) or "score" (falling score within each video).
        check: "flag" records odd scores in `Selection.status`, for every frame of the video; "raise" makes them an
            error, at the price of a synchronisation on a GPU.

    Returns:
        A `Selection` whose sizes are known on the host. Indices carry no gradient.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> scores = torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.6, 0.1, 0.5, 0.2]])
        >>> kept = ck.topk_tokens(scores, keep_ratio=0.5)
        >>> kept.indices, kept.frame_counts
        (tensor([1, 2, 3, 4]), tensor([3, 1]))
    """
    op = "topk_tokens"
    check_scores(op, "token_scores", token_scores)
    check_choice(op, "order", order, ("index", "score"))
    check_choice(op, "check", check, ("flag", "raise"))
    grid = parse_grid(op, grid_thw, token_scores)
    b = parse_budget(op, grid, keep_ratio, num_tokens, 1.0, None, False)
    if token_scores.numel() != b.tokens or not 1 <= token_scores.dim() <= 3:
        raise ValueError(
            f"{op}: token_scores must hold one score for each of the {b.tokens} tokens of grid_thw={list(grid)} "
            f"(token_scores: {describe(token_scores)}). Pass [N], [T, P] or [B, T, P]."
        )
    scores = token_scores.detach().reshape(-1)
    bounds = [0, *accumulate(t * h * w for t, h, w in grid)]
    indices, status = _segmented_topk(scores, bounds, list(b.num_keep), order == "score")
    if check == "raise":
        raise_if_flagged(op, status, "video")
    frames = frames_of(indices, b.num_keep, grid)
    counts = frames.new_zeros(b.frames).scatter_add(0, frames, torch.ones_like(frames))
    of_frames = [status[i : i + 1].expand(t) for i, (t, _, _) in enumerate(grid)]
    frame_status = torch.cat([status[:0], *of_frames])
    return Selection(indices, counts, frame_status, tuple(b.num_keep), grid)


def segmented_topk(
    scores: Tensor,
    k: int | Sequence[int],
    cu_seqlens: Sequence[int] | Tensor | None = None,
    *,
    order: str = "index",
    check: str = "flag",
) -> Tensor:
    """Finds the k best scores of every segment.

    Args:
        scores: `[N]` with `cu_seqlens`, or `[S, P]` for segments of equal length, or `[N]` alone for one
            segment; float32, bfloat16 or float16. Ties go to the lower index, NaN ranks last.
        k: how many per segment, one number or one per segment, each in [0, length].
        cu_seqlens: S + 1 segment boundaries on the host, from 0 to N, never falling.
        order: "index" (ascending) or "score" (falling score).
        check: "flag" ranks NaN last silently; "raise" makes NaN and +inf an error.

    Returns:
        `[sum of k]` int64, flat positions, segment by segment.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> ck.segmented_topk(torch.tensor([0.3, 0.1, 0.2, 0.5, 0.4]), 1, cu_seqlens=[0, 3, 5])
        tensor([0, 3])
    """
    op = "segmented_topk"
    check_scores(op, "scores", scores)
    check_choice(op, "order", order, ("index", "score"))
    check_choice(op, "check", check, ("flag", "raise"))
    if cu_seqlens is None:
        if not 1 <= scores.dim() <= 2:
            raise ValueError(f"{op}: scores must be [N] or [S, P] (scores: {describe(scores)}).")
        rows, length = (1, scores.shape[0]) if scores.dim() == 1 else scores.shape
        cu_seqlens = [i * length for i in range(rows + 1)]
    elif scores.dim() != 1:
        raise ValueError(f"{op}: scores must be [N] when cu_seqlens is given (scores: {describe(scores)}).")
    bounds = list(host_ints(op, "cu_seqlens", cu_seqlens))
    falls = any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    if not bounds or bounds[0] != 0 or bounds[-1] != scores.numel() or falls:
        raise ValueError(
            f"{op}: cu_seqlens={bounds[:8]} must rise from 0 to N={scores.numel()}. "
            f"Pass the starts of the segments and N behind them."
        )
    segments = len(bounds) - 1
    ks = list(host_ints(op, "k", (k,) * segments if is_one_int(k) else k))
    if len(ks) != segments:
        raise ValueError(f"{op}: k has {len(ks)} entries for {segments} segments.")
    for s, want in enumerate(ks):
        if not 0 <= want <= bounds[s + 1] - bounds[s]:
            raise ValueError(
                f"{op}: k={want} must be in [0, {bounds[s + 1] - bounds[s]}], the length of segment {s} "
                f"(scores: {describe(scores)}). Lower k."
            )
    scores = scores.detach() if scores.requires_grad else scores
    indices, status = _segmented_topk(scores, bounds, ks, order == "score")
    if check == "raise":
        raise_if_flagged(op, status, "segment")
    return indices
