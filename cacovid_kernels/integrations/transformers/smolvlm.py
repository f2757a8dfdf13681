"""SmolVLM2: frames are images of one tile behind a timestamp; a large image is rows and columns of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacovid_kernels.integrations.transformers.tiles import TiledAdapter


class SmolVLM(TiledAdapter):
    family = "SmolVLM2"
    model_types = ("smolvlm",)
    pixel_axes = ("B", "tiles", "channels", "rows", "columns")
    # Two tiles of a split image stand 2 apart (fake token, row and column) or 3 to 4 across a line; a frame brings
    # the fake token that ends the last one, a timestamp, a fake token and the global mark.
    closest_frames = 5

    def tile(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> int:
        vision = model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2
