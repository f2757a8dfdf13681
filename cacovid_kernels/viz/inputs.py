"""What every picture of a selection is drawn from, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Shown(NamedTuple):
    """One video and what is kept of it."""

    frames: np.ndarray  # [t, H, W, 3] uint8
    mask: np.ndarray  # [t, h, w] bool
    scores: np.ndarray | None  # [t, h, w] float64


def shown(
    op: str, frames: Any, selection: Any, scores: Any, grid: Sequence[int] | None, timestamps: Sequence[float] | None
) -> Shown:
    """The arguments of a picture as arrays of one grid.

    Raises:
        ValueError: a shape does not agree with the grid; one line, begun by `op`.
    """
    frames = _array(frames)
    mask = kept_cells(op, selection, grid)
    t = len(mask)
    if frames.ndim != 4 or frames.shape[0] != t or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"{op}: frames must be [{t}, H, W, 3] uint8 "
            f"(frames: {list(frames.shape)} {frames.dtype}). Pass the frames that the grid describes."
        )
    heat = None if scores is None else _array(scores).astype(np.float64)
    if heat is not None and heat.size != mask.size:
        raise ValueError(
            f"{op}: scores hold {heat.size} tokens, grid {mask.shape} has {mask.size}. Pass one per token."
        )
    if timestamps is not None and len(timestamps) != t:
        raise ValueError(
            f"{op}: timestamps has {len(timestamps)} entries, grid {mask.shape} has {t} frames. Pass one per frame."
        )
    if timestamps is not None and not all(map(math.isfinite, timestamps)):
        raise ValueError(f"{op}: timestamps must be finite seconds (timestamps: {list(timestamps)}). Leave them out.")
    return Shown(frames, mask, None if heat is None else heat.reshape(mask.shape))


def kept_cells(op: str, selection: Any, grid: Sequence[int] | None) -> np.ndarray:
    """`[t, h, w]` bool: the tokens of one video that a `Selection` or a mask keeps."""
    if hasattr(selection, "grid_thw"):
        if len(selection.grid_thw) != 1:
            raise ValueError(
                f"{op}: selection holds {len(selection.grid_thw)} videos; it must hold one. Pass the mask of one video."
            )
        grid = grid or selection.grid_thw[0]
        selection = selection.mask()
    mask = _array(selection).astype(bool)
    if grid is None and mask.ndim == 3:
        grid = mask.shape
    if grid is None or len(grid) != 3:
        raise ValueError(f"{op}: grid must be (t, h, w) when the selection is a flat mask. Pass grid=.")
    t, h, w = (int(size) for size in grid)
    if mask.size != t * h * w:
        raise ValueError(
            f"{op}: selection holds {mask.size} tokens, grid {(t, h, w)} has {t * h * w}. Pass the grid of its video."
        )
    return mask.reshape(t, h, w)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)
