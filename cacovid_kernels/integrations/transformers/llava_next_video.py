"""LLaVA-NeXT-Video: all frames flat, nothing between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, square


class LlavaNextVideo(Adapter):
    family = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    pixel_axes = ("videos", "frames", "channels", "rows", "columns")

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        return [Visual.video((frames, *square(num_features // (videos * frames))))] * videos
