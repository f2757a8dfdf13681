"""One picture of a selection: every frame with its kept tokens, and the scores that decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cacovid_kernels.viz.colours import heat_colours, normalise
from cacovid_kernels.viz.inputs import shown

if TYPE_CHECKING:
    from torch import Tensor

    from cacovid_kernels.selection import Selection

INK, MUTED, PAPER, RULE = (28, 31, 38), (118, 124, 134), (255, 255, 255), (226, 229, 234)
ACCENT = (214, 92, 40)
CELL_WIDTH, GAP, MARGIN, CAPTION = 196, 12, 36, 24
DIM = 0.42  # brightness of a dropped cell


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
    frames, mask, heat = shown("plot_selection", frames, selection, scores, grid, timestamps)
    t, h, w = mask.shape
    if title is None:
        title = f"{int(mask.sum()):,} of {mask.size:,} tokens kept ({mask.mean():.1%})"
    sheet = _Sheet(t, frames.shape[2] / frames.shape[1], max(1, min(columns, t)), heat is not None)
    sheet.headline(title, f"{t} frames of {h} x {w} tokens")
    normal, low, high = (None, 0.0, 0.0) if heat is None else normalise(heat)
    most = max(1, int(mask.sum((1, 2)).max()))
    for i in range(t):
        sheet.frame(i, frames[i], mask[i], None if timestamps is None else timestamps[i], most)
        if normal is not None:
            sheet.heat(i, normal[i], mask[i])
    if normal is not None:
        sheet.colour_bar(low, high)
    return sheet.image


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
