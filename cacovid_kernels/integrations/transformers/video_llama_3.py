"""VideoLLaMA3: a time stamp before every frame; its processor may have dropped tokens that hardly changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual


class VideoLlama3(Adapter):
    family = "VideoLLaMA3"
    model_types = ("video_llama_3",)

    def features(self, model: Any, output: Any, modality: str, inputs: Mapping[str, Any]) -> Tensor:
        features = super().features(model, output, modality, inputs)
        mask = inputs.get("video_compression_mask") if modality == "video" else None
        return features if mask is None else features[mask.to(features.device)]

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        merges = inputs["video_merge_sizes"].tolist()
        grids = [(t, h // m, w // m) for (t, h, w), m in zip(inputs["video_grid_thw"].tolist(), merges, strict=True)]
        mask = inputs.get("video_compression_mask")
        if mask is None:
            return [Visual.video(grid) for grid in grids]
        # Frames that lost tokens are no rectangle any more: such a video counts as one frame in one row.
        parts = mask.cpu().split([t * h * w for t, h, w in grids])
        kept = [int(part.sum()) for part in parts]
        return [
            Visual.video(grid if part.all() else (1, 1, n)) for grid, part, n in zip(grids, parts, kept, strict=True)
        ]
