"""Checks shared by the ops: every message names the op, the value, the rule and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[tuple[int, int, int], ...]

SCORE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def describe(x: Tensor) -> str:
    """Shape, dtype and device of a tensor for an error message: `[8, 64] bfloat16 cpu`."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"


def check_scores(op: str, name: str, x: Tensor) -> None:
    """A strided float32, bfloat16 or float16 tensor, or TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}. Wrap it in torch.tensor.")
    if x.dtype not in SCORE_TYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16 or float16 ({name}: {describe(x)}). Call .float() on it."
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be strided, got {x.layout}. Call .to_dense() on it.")


def check_same_device(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Two tensors on one device, or ValueError."""
    if x.device != y.device:
        raise ValueError(f"{op}: {name} is on {x.device} but {other} on {y.device}. Move {name} to {y.device}.")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`, or ValueError."""
    if value not in choices:
        raise ValueError(f"{op}: {name}={value!r} must be one of {list(choices)}.")


@lru_cache(maxsize=256)
def _checked_grid(op: str, grid: Grid) -> Grid:
    for video in grid:
        if len(video) != 3 or any(n < 1 for n in video):
            raise ValueError(
                f"{op}: grid_thw has the entry {video}, each must be three positive integers (frames, rows, columns)."
            )
    return grid


def parse_grid(op: str, grid_thw: Sequence[Sequence[int]] | Tensor | None, scores: Tensor) -> Grid:
    """Host-side (frames, rows, columns) of every video; without a grid the dense shape of `scores` says it."""
    if grid_thw is None:
        if scores.dim() == 2:
            return ((scores.shape[0], 1, scores.shape[1]),)
        if scores.dim() == 3:
            return ((scores.shape[1], 1, scores.shape[2]),) * scores.shape[0]
        raise ValueError(
            f"{op}: grid_thw is needed for packed scores (scores: {describe(scores)}). "
            f"Pass (frames, rows, columns) per video, or scores of shape [T, P] or [B, T, P]."
        )
    if isinstance(grid_thw, Tensor):
        if grid_thw.device.type != "cpu":
            raise ValueError(
                f"{op}: grid_thw is on {grid_thw.device}; reading it would synchronise. Pass grid_thw.tolist(), made once."
            )
        grid_thw = grid_thw.tolist()
    videos = [grid_thw] if len(grid_thw) == 3 and isinstance(grid_thw[0], int) else grid_thw
    grid = tuple(tuple(video) for video in videos)  # type: ignore[arg-type]
    return grid if torch.compiler.is_compiling() else _checked_grid(op, grid)  # type: ignore[arg-type, return-value]


class Budget(NamedTuple):
    """What the host knows about every video's budget before it sees a score."""

    grid: list[int]  # frames, rows, columns of every video in one list, as the ops take it
    num_keep: list[int]
    keep_ratio: list[float]
    max_frame_ratio: list[float]


def parse_budget(
    op: str,
    grid: Grid,
    keep_ratio: float | None,
    num_tokens: int | Sequence[int] | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool = True,
) -> Budget:
    """Tokens to keep, keep ratio and frame cap of every video, from either way of naming a budget."""
    if num_tokens is not None and not isinstance(num_tokens, (int, torch.SymInt)):
        num_tokens = tuple(num_tokens)
    # Videos of a job repeat their grids: the host arithmetic of a call is looked up, except while tracing.
    plan = _plan_budget if torch.compiler.is_compiling() else _known_budget
    return plan(op, grid, keep_ratio, num_tokens, importance_ratio, max_frame_ratio, strict, fill)


def _plan_budget(
    op: str,
    grid: Grid,
    keep_ratio: float | None,
    num_tokens: int | tuple[int, ...] | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool,
) -> Budget:
    if (keep_ratio is None) == (num_tokens is None):
        raise ValueError(
            f"{op}: pass exactly one of keep_ratio and num_tokens, "
            f"got keep_ratio={keep_ratio} and num_tokens={num_tokens}."
        )
    if not 0.0 <= importance_ratio <= 1.0:
        raise ValueError(f"{op}: importance_ratio={importance_ratio} must be in [0, 1].")
    if max_frame_ratio is not None and not 0.0 < max_frame_ratio < math.inf:
        raise ValueError(f"{op}: max_frame_ratio={max_frame_ratio} must be a positive number.")
    if keep_ratio is not None:
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"{op}: keep_ratio={keep_ratio} must be in (0, 1].")
        ratios = [float(keep_ratio)] * len(grid)
        kept = [_tokens_kept(keep_ratio, importance_ratio, fill, *video) for video in grid]
    else:
        kept = list(num_tokens) if isinstance(num_tokens, tuple) else [num_tokens] * len(grid)  # type: ignore[list-item]
        if len(kept) != len(grid):
            raise ValueError(f"{op}: num_tokens has {len(kept)} entries for {len(grid)} videos.")
        for k, (t, h, w) in zip(kept, grid, strict=True):
            if not 1 <= k <= t * h * w:
                raise ValueError(f"{op}: num_tokens={k} must be in [1, {t * h * w}] for the video {(t, h, w)}.")
        ratios = [k / (t * h * w) for k, (t, h, w) in zip(kept, grid, strict=True)]
    if strict and max_frame_ratio is not None and any(max_frame_ratio < r for r in ratios):
        raise ValueError(
            f"{op}: max_frame_ratio={max_frame_ratio} is below the keep ratio {max(ratios):g}, so no frame could hold "
            f'its share. Raise it, or pass mode="official", which lets frames exceed it.'
        )
    caps = [1.5 * r if max_frame_ratio is None else float(max_frame_ratio) for r in ratios]
    return Budget([n for video in grid for n in video], kept, ratios, caps)


_known_budget = lru_cache(maxsize=1024)(_plan_budget)


def _tokens_kept(ratio: float, importance_ratio: float, fill: bool, t: int, h: int, w: int) -> int:
    # The published code multiplies in these orders; they decide which side of an integer the product falls.
    if fill and importance_ratio < 1.0:
        return max(1, math.floor(ratio * t * h * w))
    return max(1, math.floor(importance_ratio * ratio * h * w * t))
