"""Qwen3-VL: a timestamp before every frame, and features that are added again inside the first layers."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from cacovid_kernels.integrations.transformers.adapter import installed
from cacovid_kernels.integrations.transformers.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    family = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    embeddings_suffice = False
    frames_apart = True

    def check(self, model: Any) -> None:
        super().check(model)
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            raise RuntimeError(
                f"prune_inputs: {type(model).__name__} of transformers {installed()} takes no mm_encoder_outputs, the "
                f"only way to pass compacted deepstack features. Use transformers >= 5.18."
            )

    def pack(self, model: Any, prompt: Any) -> dict[str, Any]:
        # Embeddings alone would lose the deepstack features: ids and encoder outputs go in together. One entry
        # per video, so that beam search can repeat the videos of each row.
        encoded = dict(prompt.encoded)
        video = encoded["video"]
        kept, lengths = prompt.indices, list(prompt.lengths)
        encoded["video"] = type(video)(
            pooler_output=torch.cat(tuple(video.pooler_output))[kept].split(lengths),
            deepstack_features=[torch.cat(tuple(layer))[kept].split(lengths) for layer in video.deepstack_features],
        )
        return {"input_ids": prompt.input_ids, "mm_encoder_outputs": encoded}
