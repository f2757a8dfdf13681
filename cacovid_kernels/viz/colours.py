"""Scores as colours."""

from __future__ import annotations

import numpy as np

# Nine points of matplotlib's "inferno": lightness rises evenly, also in greyscale and for colour-blind eyes.
INFERNO = np.array(
    [(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
     (249, 201, 50), (252, 255, 164)], dtype=np.float32
)  # fmt: skip


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colour of every value.

    Args:
        values: any shape, float, in [0, 1]; NaN is grey.

    Returns:
        The shape of `values` + [3], uint8.
    """
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(INFERNO) - 1)
    low = np.minimum(place.astype(int), len(INFERNO) - 2)
    colours = INFERNO[low] + (place - low)[..., None] * (INFERNO[low + 1] - INFERNO[low])
    colours[np.isnan(values)] = 128
    return colours.round().astype(np.uint8)


def normalise(scores: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Scores as [0, 1] between their 1st and 99th percentile: one outlier must not darken the rest."""
    finite = scores[np.isfinite(scores)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
    span = high - low if high > low else 1.0
    return (
        np.where(np.isfinite(scores), np.clip((scores - low) / span, 0, 1), np.nan),
        float(low),
        float(high),
    )
