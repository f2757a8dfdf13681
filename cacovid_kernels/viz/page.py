"""A selection as one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cacovid_kernels.viz.colours import heat_colours, normalise
from cacovid_kernels.viz.inputs import kept_cells, shown

if TYPE_CHECKING:
    from torch import Tensor

    from cacovid_kernels.selection import Selection

PIXELS = 4_500_000  # of all embedded frames together: below 5 MB of page even where the frames are noise
LOSSLESS = 1_000_000  # bytes of frames that are embedded as they are: small ones, whose pixels show
WIDEST = 640  # pixels of a frame; a page shows none wider, also on a screen of double density


def report(
    frames: np.ndarray | Tensor,
    selection: Selection | np.ndarray | Tensor | Sequence[Selection | np.ndarray | Tensor],
    scores: np.ndarray | Tensor | None = None,
    grid: Sequence[int] | None = None,
    *,
    timestamps: Sequence[float] | None = None,
    title: str | None = None,
    question: str | None = None,
    answers: Mapping[str, str] | None = None,
) -> str:
    """Write a page that shows a selection: frames, kept tokens, score heat, tokens per frame over time.

    A slider changes the share of tokens that is kept. With one selection and scores, the page computes what
    `topk_tokens(scores, keep_ratio=...)` keeps: the best floor(ratio * tokens), at least one, of the whole video,
    equal scores to the lower index. That is what the selection itself would be at another ratio only if it was made
    that way; one button goes back to it. With a list of selections nothing is computed: the slider goes through them.

    Args:
        frames: `[T, H, W, 3]` uint8, the frames as shown to the model, any height and width.
        selection: a `Selection` of one video, or a bool mask of T * h * w tokens in any shape; or a list of these,
            of the same video at several ratios, the one to show first in front.
        scores: T * h * w token scores in any shape, float, larger = kept first; embedded as float32. Without them
            there is no heat, and no slider for one selection. Non-finite scores are grey.
        grid: `(t, h, w)` of the video; taken from the selection or from a `[t, h, w]` mask when not given.
        timestamps: seconds of each frame.
        title: headline; "Kept video tokens" when not given.
        question: what the model was asked.
        answers: who answered -> the answer, in the order to show.

    Returns:
        The page as text; it refers to nothing outside itself. The same arguments give the same text.

    Raises:
        ValueError, TypeError: a shape does not agree with the grid; one line says which.

    Example:
        >>> frames = np.zeros((4, 90, 160, 3), np.uint8)
        >>> mask = np.zeros((4, 3, 3), bool); mask[:, 1, 1] = True
        >>> report(frames, mask, np.random.rand(4, 3, 3))[:15]
        '<!doctype html>'
    """
    selections = list(selection) if isinstance(selection, (list, tuple)) else [selection]
    if not selections:
        raise ValueError("report: selection is an empty list. Pass one selection or more.")
    if answers is not None and not isinstance(answers, Mapping):
        raise TypeError(
            f"report: answers must map who answered to the answer (answers: {type(answers).__name__}). Pass a dict."
        )
    frames, mask, heat = shown("report", frames, selections[0], scores, grid, timestamps)
    masks = [kept_cells("report", one, grid) for one in selections]
    for i, other in enumerate(masks):
        if other.shape != mask.shape:
            raise ValueError(
                f"report: selection {i} has grid {other.shape}, the first one {mask.shape}. Pass one video."
            )
    record = {
        "grid": mask.shape,
        "size": frames.shape[2:0:-1],
        "timestamps": None if timestamps is None else [round(float(second), 3) for second in timestamps],
        "question": question,
        "answers": list((answers or {}).items()),
        "selections": [_text(np.packbits(one, bitorder="little").tobytes()) for one in masks],
        "scores": None,
        "frames": _pictures(frames),
    }
    if heat is not None:
        normal, low, high = normalise(heat)
        with np.errstate(over="ignore"):  # as in torch, what float32 does not hold is infinite
            numbers = heat.astype("<f4").tobytes()
        record |= {
            "scores": _text(numbers),
            "heat": [_uri(heat_colours(cells), "PNG", optimize=True) for cells in normal],
            "scale": [f"{low:.3g}", _uri(heat_colours(np.linspace(0, 1, 256)[None]), "PNG"), f"{high:.3g}"],
        }
    values = {
        "title": html.escape(title or "Kept video tokens"),
        "style": _source("report.css"),
        "record": json.dumps(record, separators=(",", ":")).replace("<", "\\u003c"),  # "</script>" would end it
        "script": _source("report.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: values[name[1]], _source("report.html"))


def _source(name: str) -> str:
    return resources.files("cacovid_kernels.viz").joinpath(name).read_text(encoding="utf-8")


def _pictures(frames: np.ndarray) -> list[str]:
    """Every frame as a data URI, no larger than it is shown."""
    count, height, width, _ = frames.shape
    scale = min(1.0, WIDEST / width, (PIXELS / (count * height * width)) ** 0.5)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind, options = ("PNG", {}) if frames.nbytes <= LOSSLESS else ("JPEG", {"quality": 85})
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    return [
        _uri(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)), kind, optimize=True, **options)
        for picture in pictures
    ]


def _uri(pixels: np.ndarray, kind: str, **options: object) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{_text(file.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
