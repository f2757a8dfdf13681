"""Video-LLaVA: every frame starts with the vision tower's class token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, square


class VideoLlava(Adapter):
    family = "Video-LLaVA"
    model_types = ("video_llava",)
    pixel_axes = ("videos", "frames", "channels", "rows", "columns")

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        grid = (frames, *square(num_features // (videos * frames) - 1))
        return [Visual.video(grid, class_tokens=1)] * videos
