"""One picture of a selection: every frame with its kept tokens, and the scores that decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

    from cacovid_kernels.selection import Selection

INK, MUTED, PAPER, RULE = (28, 31, 38), (118, 124, 134), (255, 255, 255), (226, 229, 234)
ACCENT = (214, 92, 40)
CELL_WIDTH, GAP, MARGIN, CAPTION = 196, 12, 36, 24
DIM = 0.42  # brightness of a dropped cell

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


def plot_selection(
    frames: np.ndarray | Tensor,
    selection: Selection | np.ndarray | Tensor,
    scores: np.ndarray | Tensor | None = None,
    grid: Sequence[int] | None = None,
    *,
    timestamps: Sequence[float] | None = None,
    title: str | None = None,
    columns: int = 8,
) -> Image.Image:
    """Draw a contact sheet: each frame with kept tokens bright and dropped ones dim, over its score heat.

    Args:
        frames: `[T, H, W, 3]` uint8, the frames as shown to the model, any height and width.
        selection: a `Selection` of one video, or a bool mask of T * h * w tokens in any shape.
        scores: T * h * w token scores in any shape, float, larger = kept first. Without them the heat is left
            out. Non-finite scores are grey.
        grid: `(t, h, w)` of the video; taken from the selection or from a `[t, h, w]` mask when not given.
        timestamps: seconds of each frame, for the captions.
        title: headline; by default how many tokens are kept.
        columns: frames per row.

    Returns:
        An RGB picture; `.save("kept_tokens.png")` writes it.

    Raises:
        ValueError: a shape does not agree with the grid.

    Example:
        >>> frames = np.zeros((4, 90, 160, 3), np.uint8)
        >>> mask = np.zeros((4, 3, 3), bool); mask[:, 1, 1] = True
        >>> plot_selection(frames, mask, np.random.rand(4, 3, 3)).mode
        'RGB'
    """
    frames = _array(frames)
    mask, grid = _mask_and_grid(selection, grid)
    t, h, w = grid
    if frames.ndim != 4 or frames.shape[0] != t or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"plot_selection: frames must be [{t}, H, W, 3] uint8 "
            f"(frames: {list(frames.shape)} {frames.dtype}). Pass the frames that the grid describes."
        )
    if mask.size != t * h * w:
        raise ValueError(f"plot_selection: selection holds {mask.size} tokens, grid {grid} has {t * h * w}.")
    mask = mask.reshape(t, h, w)
    heat = None if scores is None else _array(scores).astype(np.float64)
    if heat is not None and heat.size != mask.size:
        raise ValueError(f"plot_selection: scores hold {heat.size} tokens, grid {grid} has {mask.size}.")
    if timestamps is not None and len(timestamps) != t:
        raise ValueError(f"plot_selection: timestamps has {len(timestamps)} entries, grid {grid} has {t} frames.")

    if title is None:
        title = f"{int(mask.sum()):,} of {mask.size:,} tokens kept ({mask.mean():.1%})"
    sheet = _Sheet(t, frames.shape[2] / max(1, frames.shape[1]), max(1, min(columns, t)), heat is not None)
    sheet.headline(title, f"{t} frames of {h} x {w} tokens")
    normal, low, high = (None, 0.0, 0.0) if heat is None else _normalise(heat.reshape(t, h, w))
    most = max(1, int(mask.sum((1, 2)).max()))
    for i in range(t):
        sheet.frame(i, frames[i], mask[i], None if timestamps is None else timestamps[i], most)
        if normal is not None:
            sheet.heat(i, normal[i], mask[i])
    if normal is not None:
        sheet.colour_bar(low, high)
    return sheet.image


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().float().numpy() if getattr(values, "is_floating_point", bool)() else np.asarray(values)


def _mask_and_grid(selection: Any, grid: Sequence[int] | None) -> tuple[np.ndarray, tuple[int, int, int]]:
    if hasattr(selection, "grid_thw"):
        if len(selection.grid_thw) != 1:
            raise ValueError(
                f"plot_selection: selection holds {len(selection.grid_thw)} videos; it must hold one. "
                "Pass the mask of one video."
            )
        grid = grid or selection.grid_thw[0]
        selection = selection.mask().cpu()
    mask = np.asarray(selection).astype(bool)
    if grid is None and mask.ndim == 3:
        grid = mask.shape
    if grid is None or len(grid) != 3:
        raise ValueError("plot_selection: grid must be (t, h, w) when the selection is a flat mask. Pass grid=.")
    t, h, w = (int(size) for size in grid)
    return mask, (t, h, w)


def _normalise(scores: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Scores as [0, 1] between their 1st and 99th percentile: one outlier must not darken the rest."""
    finite = scores[np.isfinite(scores)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 0.0)
    span = high - low if high > low else 1.0
    return (
        np.where(np.isfinite(scores), np.clip((scores - low) / span, 0, 1), np.nan),
        float(low),
        float(high),
    )


class _Sheet:
    """Places of the pictures on the page; every size is in pixels."""

    def __init__(self, count: int, aspect: float, columns: int, has_heat: bool) -> None:
        self.columns, self.rows = columns, -(-count // columns)
        self.width = CELL_WIDTH
        self.height = min(3 * CELL_WIDTH, max(24, round(CELL_WIDTH / aspect)))
        self.pitch = CAPTION + self.height * (2 if has_heat else 1) + (4 if has_heat else 0) + 14
        self.top = 92
        page_width = max(2 * MARGIN + columns * (self.width + GAP) - GAP, 560)
        page_height = self.top + self.rows * self.pitch + (58 if has_heat else 10)
        self.image = Image.new("RGB", (page_width, page_height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.small, self.large = ImageFont.load_default(14), ImageFont.load_default(26)

    def headline(self, title: str, subtitle: str) -> None:
        self.draw.text((MARGIN, 22), title, fill=INK, font=self.large)
        self.draw.text((MARGIN, 58), subtitle, fill=MUTED, font=self.small)

    def frame(self, i: int, picture: np.ndarray, kept: np.ndarray, second: float | None, most: int) -> None:
        x, y = self._corner(i)
        label = f"frame {i}" if second is None else f"{second:.2f} s"
        count = int(kept.sum())
        self.draw.text((x, y), label, fill=MUTED, font=self.small)
        text = f"{count} kept"
        self.draw.text((x + self.width - self.draw.textlength(text, self.small), y), text, fill=INK, font=self.small)
        self.draw.line((x, y + 20, x + self.width - 1, y + 20), fill=RULE, width=2)
        if count:
            self.draw.line((x, y + 20, x + round(self.width * count / most) - 1, y + 20), fill=ACCENT, width=2)
        size = (self.width, self.height)
        colour = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
        grey = colour.mean(-1, keepdims=True)
        dropped = DIM * (0.35 * colour + 0.65 * grey)
        page = np.where(self._enlarge(kept)[..., None], colour, dropped).astype(np.uint8)
        page &= 0xFC  # invisible, and the file is a third smaller
        self.image.paste(Image.fromarray(page), (x, y + CAPTION))

    def heat(self, i: int, values: np.ndarray, kept: np.ndarray) -> None:
        x, y = self._corner(i)
        page = heat_colours(self._enlarge(values))
        inside = self._enlarge(kept)
        edge = np.zeros_like(inside)  # kept cells are outlined where they meet dropped ones
        edge[1:] |= inside[1:] != inside[:-1]
        edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
        light = page.mean(-1) > 150
        page[edge] = np.where(light[..., None], INK, PAPER).astype(np.uint8)[edge]
        self.image.paste(Image.fromarray(page), (x, y + CAPTION + self.height + 4))

    def colour_bar(self, low: float, high: float) -> None:
        y = self.top + self.rows * self.pitch + 8
        bar = np.broadcast_to(heat_colours(np.linspace(0, 1, 260)), (14, 260, 3))
        self.draw.text((MARGIN, y - 1), "token score", fill=MUTED, font=self.small)
        x = MARGIN + 92
        text = f"{low:.3g}"
        self.draw.text((x, y - 1), text, fill=INK, font=self.small)
        x += round(self.draw.textlength(text, self.small)) + 8
        self.image.paste(Image.fromarray(bar.copy()), (x, y))
        self.draw.text((x + 268, y - 1), f"{high:.3g}", fill=INK, font=self.small)

    def _corner(self, i: int) -> tuple[int, int]:
        row, column = divmod(i, self.columns)
        return MARGIN + column * (self.width + GAP), self.top + row * self.pitch

    def _enlarge(self, cells: np.ndarray) -> np.ndarray:
        """Every pixel takes the value of the cell it lies in."""
        h, w = cells.shape
        rows = np.arange(self.height) * h // self.height
        return cells[rows[:, None], np.arange(self.width) * w // self.width]
