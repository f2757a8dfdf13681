"""VideoLLaMA3: a time stamp before every frame; its processor may have dropped tokens that hardly changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Visual, check_axes
from cacovid_kernels.integrations.transformers.grids import GriddedAdapter


class VideoLlama3(GriddedAdapter):
    family = "VideoLLaMA3"
    model_types = ("video_llama_3",)
    frames_apart = frames_may_touch = True

    def features(self, model: Any, output: Any, modality: str, inputs: Mapping[str, Any]) -> Tensor:
        features = super().features(model, output, modality, inputs)
        mask = inputs.get("video_compression_mask") if modality == "video" else None
        return features if mask is None else features[mask.to(features.device)]

    def merges(self, model: Any, inputs: Mapping[str, Any], modality: str, count: int) -> list[int]:
        name = f"{modality}_merge_sizes"
        sizes = inputs.get(name)
        if sizes is None:
            raise ValueError(f"prune_inputs: inputs hold no {name}. Pass the processor's whole output.")
        check_axes(name, sizes, (str(count),))
        return sizes.tolist()

    def runs(self, inputs: Mapping[str, Any], grids: list[tuple[int, int, int]]) -> list[list[int]]:
        mask = inputs.get("video_compression_mask")
        if mask is None:
            return super().runs(inputs, grids)
        check_axes("video_compression_mask", mask, (str(sum(t * h * w for t, h, w in grids)),))
        frames = [[int(frame.sum()) for frame in part.split(h * w)] for part, (_, h, w) in _parts(mask, grids)]
        return [[kept for kept in video if kept] for video in frames]

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        mask = inputs.get("video_compression_mask")
        if mask is None:
            return super().visuals(model, inputs, num_features)
        # Frames that lost tokens are no rectangle any more: such a video counts as one frame in one row.
        grids = self.grids(model, inputs, "video")
        return [Visual.video(grid if part.all() else (1, 1, int(part.sum()))) for part, grid in _parts(mask, grids)]


def _parts(mask: Tensor, grids: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, tuple[int, int, int]]]:
    """What the processor left of every video, `[t * h * w]` bool, and its grid."""
    return zip(mask.cpu().split([t * h * w for t, h, w in grids]), grids, strict=True)
