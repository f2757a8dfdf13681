"""LLaVA-OneVision: all frames flat, one newline behind the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, square


class LlavaOneVision(Adapter):
    family = "LLaVA-OneVision"
    model_types = ("llava_onevision",)

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        grid = (frames, *square((num_features // videos - 1) // frames))
        return [Visual.video(grid, newlines=1)] * videos
