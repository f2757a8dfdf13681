"""What training needs of a frozen model, and how checkpoints are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from cacovid_kernels.errors import UserError, first_line


class VideoModel(Protocol):
    """A Video-LLM of transformers with what turns frames and a question into its inputs.

    Attributes:
        network: the `...ForConditionalGeneration`, of a family that `integrations.transformers` knows.
        tokenizer: its tokenizer.
    """

    @property
    def network(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    def inputs(self, frames: np.ndarray, question: str, timestamps: Sequence[float] | None = None) -> dict[str, Any]:
        """What a processor returns for one prompt of one video and a question, up to where the answer begins.

        Args:
            frames: `[T, H, W, 3]` uint8.
            question: the text behind the video.
            timestamps: T times in seconds from the first frame, for models that read them.

        Returns:
            `input_ids [1, L]`, `attention_mask`, pixels, grids, on the network's device.

        Raises:
            UserError: the question cannot be written in the model's tokens.
        """
        ...


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Inside, what a broken or missing checkpoint raises becomes a `UserError` of one line."""
    try:
        yield
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise UserError(f"model: {name} cannot be loaded: {first_line(error)} Give a checkpoint folder.") from None
