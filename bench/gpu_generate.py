"""The first token of a Video-LLM on a GPU, whole and compressed."""

from __future__ import annotations

import torch
from baselines.generate import WIDTHS, Prompt
from gpu_device import Device
from gpu_measure import Race, same_size

from cacovid_kernels.compressors import divprune

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def first_token(gpu: Device) -> Race:
    """Language model and policy as large as LLaVA-OneVision 0.5B has them, after the vision tower."""
    layers, frames, dtype = gpu.pick((24, 32, torch.bfloat16), (1, 1, torch.float32))
    prompt = Prompt(frames, {**WIDTHS, **gpu.pick({}, SMALL), "num_hidden_layers": layers}, gpu.device, dtype)
    contestants = {
        "ours": lambda: prompt.first_token(prompt.policy, 0.1),
        "full prompt": prompt.first_token,
        "DivPrune": lambda: prompt.first_token(divprune, 0.1),
    }
    parts = (prompt.model.model.language_model.layers, prompt.policy)
    kept = prompt.arguments(0.1)["inputs_embeds"].shape[1]
    return Race(
        "generate", f"first token, 10% of {frames} x 196, {layers} layers", contestants, [()], same_size,
        bytes=sum(p.nbytes for part in parts for p in part.parameters()), operations=prompt.operations(kept, True),
    )  # fmt: skip
