"""Videos with questions whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A video and a question whose answer is known.

    Attributes:
        name: how errors call it.
        frames: `[T, H, W, 3]` uint8.
        question: the text behind the video.
        answer: the right one.
        timestamps: T times in seconds from the first frame; some models read them.
    """

    name: str
    frames: np.ndarray
    question: str
    answer: str
    timestamps: tuple[float, ...] | None = None


class BadRowError(Exception):
    """A row that cannot be trained on; the message names the row and says why."""


class Rows(Protocol):
    """A data set: `BadRowError` from `[i]` where row i cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample: ...
