"""LLaVA-OneVision: all frames flat, one newline behind the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, square


class LlavaOneVision(Adapter):
    family = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    pixel_axes = ("videos", "frames", "channels", "rows", "columns")

    def features(self, model: Any, output: Any, modality: str, inputs: Mapping[str, Any]) -> Tensor:
        if modality == "video":
            pooled, vision = output.pooler_output, model.config.vision_config
            side = math.ceil(vision.image_size // vision.patch_size / 2)
            if pooled.shape[1] == inputs["pixel_values_videos"].shape[1] * side * side:
                # Older versions of transformers put the newline behind the video later on.
                newline = model.base_model.image_newline.to(pooled).expand(len(pooled), 1, -1)
                return torch.cat([pooled, newline], 1).flatten(0, 1)
        return super().features(model, output, modality, inputs)

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        grid = (frames, *square((num_features // videos - 1) // frames))
        return [Visual.video(grid, newlines=1)] * videos
