"""Checks shared by the ops: every message names the op, the value, the rule and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral, Real
from operator import index
from typing import Any, NamedTuple

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


def check_tensor(op: str, name: str, x: Any, what: str) -> None:
    """A tensor, or TypeError that says `what` it has to be."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, it must be a tensor, {what}. Wrap it in torch.tensor.")


def check_number(op: str, name: str, value: Any) -> None:
    """A real number that is no truth value, or TypeError; a tensor or array of one number is one."""
    if type(value) is float:
        return
    one = isinstance(value, (Real, torch.SymFloat, torch.SymInt)) or getattr(value, "shape", None) == ()
    if isinstance(value, bool) or not one:
        raise TypeError(f"{op}: {name}={value!r} is a {type(value).__name__}, it must be a number. Pass a float.")


def check_same_device(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Two tensors on one device, or ValueError."""
    if x.device != y.device:
        raise ValueError(f"{op}: {name} is on {x.device} but {other} on {y.device}. Move {name} to {y.device}.")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`, or ValueError."""
    if value not in choices:
        raise ValueError(f"{op}: {name}={value!r} must be one of {list(choices)}. Pass one of these.")


def on_host(op: str, name: str, values: Any) -> Any:
    """Sizes given as a CPU tensor or an array become nested lists; a device tensor is a ValueError."""
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} is on {values.device}; reading it would synchronise. Pass {name}.tolist(), made once."
        )
    return values.tolist() if hasattr(values, "tolist") else values


def is_one_int(value: Any) -> bool:
    """Whether a size is one number rather than one per video or segment; a truth value is neither."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def host_ints(op: str, name: str, values: Any) -> tuple[int, ...]:
    """Plain ints, from whatever counts as integers, or TypeError; symbolic ones stay symbolic.

    Plain, because 4.0 and numpy's 4 equal 4: a cache would hand the first caller's kind to all others.
    """
    values = on_host(op, name, values)
    if torch.compiler.is_compiling():
        return tuple(values)
    try:
        ints = tuple(values)
        kinds = set(map(type, ints))
        if kinds <= {int}:
            return ints
        if bool in kinds:
            raise TypeError
        return tuple(n if isinstance(n, torch.SymInt) else int(index(n)) for n in ints)  # type: ignore[misc]
    except TypeError:
        raise TypeError(f"{op}: {name}={values!r} must be integers. Pass Python ints.") from None


@lru_cache(maxsize=256)
def _checked_grid(op: str, grid: Grid) -> Grid:
    for video in grid:
        if len(video) != 3 or any(n < 1 for n in video):
            raise ValueError(
                f"{op}: grid_thw has the entry {video}, each must be three positive integers (frames, rows, columns)."
            )
        if video[0] >= 2**22 or math.prod(video) >= 2**31:
            raise ValueError(
                f"{op}: grid_thw has the entry {video}, a video must have fewer than 2^22 frames and 2^31 tokens. "
                f"Split it."
            )
    return grid


def parse_grid(op: str, grid_thw: Sequence[Sequence[int]] | Tensor | None, scores: Tensor) -> Grid:
    """Host-side (frames, rows, columns) of every video; without a grid the dense shape of `scores` says it."""
    if grid_thw is None:
        if scores.dim() not in (2, 3):
            raise ValueError(
                f"{op}: grid_thw is needed for packed scores (scores: {describe(scores)}). "
                f"Pass (frames, rows, columns) per video, or scores of shape [T, P] or [B, T, P]."
            )
        *b, t, p = scores.shape
        grid: Grid = ((t, 1, p),) * (b[0] if b else 1)
    else:
        rows = on_host(op, "grid_thw", grid_thw)
        if not isinstance(rows, Sequence) or (len(rows) == 3 and is_one_int(rows[0])):
            rows = [rows]
        grid = tuple(host_ints(op, "grid_thw", row) for row in rows)  # type: ignore[misc]
    if not torch.compiler.is_compiling():
        try:
            return _checked_grid(op, grid)
        except TypeError:  # the symbolic sizes of a tracer have no hash
            pass
    return grid


class Budget(NamedTuple):
    """What the host knows about every video's budget before it sees a score."""

    frames: int  # over all videos
    tokens: int
    grid: list[int]  # frames, rows, columns of every video in one list, as the ops take it
    num_keep: list[int]
    keep_ratio: float | None  # None where tokens were counted: a video's own share of them then
    max_frame_ratio: float | None  # None for 1.5 times the keep ratio


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
    if num_tokens is not None:
        one = is_one_int(num_tokens)
        ints = host_ints(op, "num_tokens", (num_tokens,) if one else num_tokens)
        num_tokens = ints[0] if one else ints
    # Here, not in what is looked up: there True would be the 1.0 of an earlier call.
    for name, value in (
        ("keep_ratio", keep_ratio),
        ("importance_ratio", importance_ratio),
        ("max_frame_ratio", max_frame_ratio),
    ):
        if value is not None:
            check_number(op, name, value)
    args = (op, grid, keep_ratio, num_tokens, importance_ratio, max_frame_ratio, strict, fill)
    # Videos of a job repeat their grids: the host arithmetic of a call is looked up, except while tracing.
    if not torch.compiler.is_compiling():
        try:
            return _known_budget(*args)
        except TypeError:  # the symbolic sizes of a tracer have no hash
            pass
    return _plan_budget(*args)


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
        keep_ratio = float(keep_ratio)  # float64 whatever was passed: products decide counts
        kept = [_tokens_kept(keep_ratio, float(importance_ratio), fill, *video) for video in grid]
    else:
        kept = list(num_tokens) if isinstance(num_tokens, tuple) else [num_tokens] * len(grid)  # type: ignore[list-item]
        if len(kept) != len(grid):
            raise ValueError(f"{op}: num_tokens has {len(kept)} entries for {len(grid)} videos.")
        for k, (t, h, w) in zip(kept, grid, strict=True):
            if not 1 <= k <= t * h * w:
                raise ValueError(f"{op}: num_tokens={k} must be in [1, {t * h * w}] for the video {(t, h, w)}.")
    if max_frame_ratio is not None:
        max_frame_ratio = float(max_frame_ratio)
        if strict:
            _check_cap(op, grid, kept, keep_ratio, max_frame_ratio)
    frames, tokens = sum(t for t, _, _ in grid), sum(t * h * w for t, h, w in grid)
    return Budget(frames, tokens, [n for video in grid for n in video], kept, keep_ratio, max_frame_ratio)


def _check_cap(op: str, grid: Grid, kept: list[int], keep_ratio: float | None, max_frame_ratio: float) -> None:
    for k, (t, h, w) in zip(kept, grid, strict=True):
        ratio = k / (t * h * w) if keep_ratio is None else keep_ratio
        if max_frame_ratio < ratio:
            raise ValueError(
                f"{op}: max_frame_ratio={max_frame_ratio} is below the keep ratio {ratio:g}, so no frame could hold "
                f'its share. Raise it, or pass mode="official", which lets frames exceed it.'
            )


_known_budget = lru_cache(maxsize=1024)(_plan_budget)


def _tokens_kept(ratio: float, importance_ratio: float, fill: bool, t: int, h: int, w: int) -> int:
    # The published code multiplies in these orders; they decide which side of an integer the product falls.
    if fill and importance_ratio < 1.0:
        return max(1, math.floor(ratio * t * h * w))
    return max(1, math.floor(importance_ratio * ratio * h * w * t))
