"""Qwen2-VL: `video_grid_thw` names the grid, positions have three axes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.grids import GriddedAdapter

_POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Qwen2VL(GriddedAdapter):
    family = "Qwen2-VL"
    model_types: tuple[str, ...] = ("qwen2_vl",)

    def merges(self, model: Any, inputs: Mapping[str, Any], modality: str, count: int) -> list[int]:
        return [model.config.vision_config.spatial_merge_size] * count

    def positions(self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        # The model's own rule, on the whole prompt and on the CPU: it walks the grids item by item.
        types = inputs.get("mm_token_type_ids")
        if types is None:
            types = (ids == self.token_id(model, "image")).int() + 2 * (ids == self.token_id(model, "video")).int()
        given = {name: inputs[name] for name in _POSITION_INPUTS if inputs.get(name) is not None}
        given = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
        function = model.base_model.get_rope_index
        if "mm_token_type_ids" in inspect.signature(function).parameters:
            given["mm_token_type_ids"] = types.cpu()
        with torch.no_grad():
            return function(ids, attention_mask=mask, **given)[0]
