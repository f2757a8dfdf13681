"""Processors that turn frames and images into the same tiles of the same placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, square


class TiledAdapter(Adapter):
    """Frames and images share `pixel_values` and one placeholder id, so ids alone do not tell them apart.

    `inputs["visuals"]` does: ("video", frames) or ("image", tiles) in the order of the prompts. Without it each
    prompt is taken to hold one video and no image, or one image where it has a single tile, and is refused where tiles
    touch as only an image's do.
    """

    modality = "image"
    pixels = "pixel_values"
    closest_frames = 1  # tokens between the tiles of two frames, at least

    def tile(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> int:
        """Placeholders of one tile."""
        raise NotImplementedError

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        tile = self.tile(model, inputs, num_features)
        grid = square(tile)
        named = inputs.get("visuals")
        if named is None:
            counts = self._frames_of_rows(inputs["input_ids"].cpu() == self.token_id(model, "image"), tile)
            named = [("video" if frames > 1 else "image", frames) for frames in counts]
        items = []
        for item in [named] if isinstance(named, str) else named:
            kind, tiles = item if isinstance(item, (list, tuple)) and len(item) == 2 else (None, 0)
            if kind not in ("video", "image") or not isinstance(tiles, Integral) or tiles < 1:
                raise ValueError(
                    f'prune_inputs: visuals has the entry {item!r}, each must be ("video", frames) or ("image", tiles).'
                )
            items.append(Visual.video((int(tiles), *grid)) if kind == "video" else Visual.image(int(tiles) * tile))
        return items

    def _frames_of_rows(self, placeholders: Tensor, tile: int) -> list[int]:
        frames = []
        for row, marked in enumerate(placeholders):
            edges = torch.diff(marked.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
            runs = list(zip(edges[::2], edges[1::2], strict=True))
            close = any(start - end < self.closest_frames for (_, end), (start, _) in pairwise(runs))
            if close or any(end - start != tile for start, end in runs):
                raise ValueError(
                    f"prune_inputs: row {row} holds an image of several tiles beside its frames, or frames of another "
                    f'size than {tile} tokens. Pass inputs["visuals"] = [("video", frames), ("image", tiles), ...].'
                )
            if runs:
                frames.append(len(runs))
        return frames
