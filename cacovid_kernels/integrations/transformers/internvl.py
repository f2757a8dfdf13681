"""InternVL: frames are images of one tile between `Frame1: <img>` and `</img>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacovid_kernels.integrations.transformers.tiles import TiledAdapter


class InternVL(TiledAdapter):
    family = "InternVL"
    model_types = ("internvl",)
    pixel_axes = ("tiles", "channels", "rows", "columns")

    def tile(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> int:
        return num_features // inputs["pixel_values"].shape[0]
