"""A LLaVA-OneVision with random weights: real width, few layers; its vision tower has run before anything is timed."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.integrations.transformers import compress, prune_inputs

LAYERS, TEXT, VOCABULARY = 2, 40, 2048
IMAGE, VIDEO = VOCABULARY - 2, VOCABULARY - 1
WIDTHS = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
}  # LLaVA-OneVision 0.5B, which has 24 layers
# Its grid of 27 x 27 patches, from a tower that is next to nothing.
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


class Prompt:
    """One prompt of 40 tokens of text, `frames` of 196 tokens in their middle, its model, and a policy of that width.

    The vision tower has run: the model takes its features from a store, compressed or not.
    """

    def __init__(
        self,
        frames: int = 32,
        widths: dict[str, int] = WIDTHS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        text = {"model_type": "qwen2", "vocab_size": VOCABULARY, "max_position_embeddings": 32768, **widths}
        config = hf.LlavaOnevisionConfig(
            text_config=text, vision_config=TOWER, image_token_index=IMAGE, video_token_index=VIDEO,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip
        torch.manual_seed(0)
        config.text_config.pad_token_id = 0
        self.model = hf.LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
        self.policy = ck.CompressionPolicy(ck.PolicyConfig.from_dict(text)).eval().requires_grad_(False)
        pixels = torch.randn(1, frames, 3, 384, 384)
        inner = self.model.model
        with torch.no_grad():
            encoded = inner.get_video_features(
                pixels, vision_feature_layer=-1, vision_feature_select_strategy="full", return_dict=True
            )
        encoded.pooler_output = encoded.pooler_output.to(device, dtype)
        self.model, self.policy = self.model.to(device, dtype), self.policy.to(device, dtype)
        inner.get_video_features = functools.wraps(inner.get_video_features)(lambda *_, **__: encoded)
        ids = torch.randint(1, IMAGE, (1, TEXT + encoded.pooler_output.shape[-2]))
        ids[:, TEXT // 2 : -(TEXT // 2)] = VIDEO
        self.inputs = {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "pixel_values_videos": torch.zeros(1, device=device, dtype=dtype).expand(pixels.shape),  # nobody looks
        }

    def first_token(self, selector: Any = None, keep_ratio: float = 1.0) -> Tensor:
        """`generate` of one token, by whole prompt or compressed."""
        options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        if selector is None:
            return self.model.generate(**self.inputs, **options)
        with compress(self.model, selector, keep_ratio=keep_ratio):
            return self.model.generate(**self.inputs, **options)

    def operations(self, tokens: int, compressed: bool = False) -> int:
        """Multiplications and additions of the language model over a prompt, and of the policy before it if so."""
        whole, (layer, *others) = self.inputs["input_ids"].shape[1], self.model.model.language_model.layers
        weights, width = sum(p.numel() for p in layer.parameters()), self.policy.config.hidden_size
        causal = 2 * weights * tokens + 2 * width * tokens**2
        both_ways = 2 * weights * whole + 4 * width * whole**2
        return causal * (1 + len(others)) + both_ways * compressed

    @torch.no_grad()
    def arguments(self, keep_ratio: float) -> dict[str, Tensor]:
        """What the language model gets of the prompt, from embeddings on."""
        scores = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
        return prune_inputs(
            self.model, self.inputs, lambda x, grid: scores[: len(x)].to(x.device), keep_ratio=keep_ratio
        )

    @torch.no_grad()
    def prefill(self, arguments: dict[str, Tensor]) -> Any:
        """The language model over a prompt, and the logits behind it."""
        return self.model(**arguments, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, cache: Any, tokens: int) -> Tensor:
        """Further tokens one by one on a cache, which is then as it was."""
        full = self.inputs["input_ids"].shape[1]
        positions = torch.arange(full, full + tokens, device=self.inputs["input_ids"].device)
        token = self.inputs["input_ids"][:, :1]
        for i in range(tokens):
            logits = self.model(input_ids=token, past_key_values=cache, position_ids=positions[None, i : i + 1]).logits
            token = logits[:, -1:].argmax(-1)
        cache.crop(-tokens)
        return token
