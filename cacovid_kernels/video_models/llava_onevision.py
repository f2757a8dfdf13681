"""LLaVA-OneVision of Hugging Face without its processor, which needs torchvision: tiny and random, or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cacovid_kernels.errors import UserError
from cacovid_kernels.video_models.base import loading

# The prompt in which LLaVA-OneVision was trained, as its model card gives it.
BEFORE, AFTER = "<|im_start|>user ", "\n{question}<|im_end|><|im_start|>assistant\n"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<image>", "<video>")


@dataclass(frozen=True)
class TinyGeometry:
    """Sizes of the random model; the defaults cut a frame into 14 x 14 tokens, as the 7B checkpoint does."""

    image_size: int = 384
    patch_size: int = 14
    vision_width: int = 64
    vision_layers: int = 2
    width: int = 256
    layers: int = 4


@dataclass(frozen=True)
class LlavaOneVision:
    """A LLaVA-OneVision model with what turns frames and a question into its inputs."""

    network: Any  # transformers.LlavaOnevisionForConditionalGeneration
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def device(self) -> torch.device:
        return self.network.device

    def inputs(self, frames: np.ndarray, question: str, timestamps: Sequence[float] | None = None) -> dict[str, Any]:
        """As `VideoModel.inputs`; times do not enter this model."""
        t, h, w = self.grid(len(frames))
        ids = self.prompt(question, t * h * w)
        pixels = self.pixels(frames)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}

    def grid(self, num_frames: int) -> tuple[int, int, int]:
        """Frames, rows and columns of the video tokens: the tower's patches after 2x2 pooling."""
        vision = self.network.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        return num_frames, side, side

    def pixels(self, frames: np.ndarray) -> Tensor:
        """Frames `[T, H, W, 3]` uint8 -> the vision tower's input `[T, 3, S, S]`."""
        # Hugging Face's video processor needs torchvision, which this does not: its three steps (bicubic
        # antialiased resize, scaling to [0, 1], normalisation), with the mean and deviation of its config.
        size = self.network.config.vision_config.image_size
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        resized = []
        for frame in torch.from_numpy(np.ascontiguousarray(frames)):
            image = frame.permute(2, 0, 1)[None].float()
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).round_().clamp_(0, 255)
            resized.append((image[0] / 255 - mean) / std)
        return torch.stack(resized).to(self.device, self.network.dtype)

    def prompt(self, question: str, num_video_tokens: int) -> Tensor:
        """Token ids `[1, L]` of the chat prompt, with placeholders for the video and the newline after it."""
        config = self.network.config
        before, after = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (BEFORE, AFTER.format(question=question))
        )
        if {config.video_token_id, config.image_token_id} & set(after):
            raise UserError("question: it must not contain <video> or <image>. Leave the placeholder out.")
        unknown, vocabulary = self.tokenizer.unk_token_id, self.tokenizer.get_vocab()
        words = [w for w in question.split() if unknown in self.tokenizer(w, add_special_tokens=False)["input_ids"]]
        if words:
            few = sorted(word for word in vocabulary if word.isalpha()) if len(vocabulary) < 200 else []
            known = f" It knows: {', '.join(few)}." if few else " Say it in other words."
            raise UserError(f"question: the model has no word {', '.join(words)}.{known}")
        ids = before + [config.video_token_id] * (num_video_tokens + 1) + after
        return torch.tensor([ids], device=self.device)


def tiny_model(geometry: TinyGeometry = TinyGeometry(), seed: int = 0) -> LlavaOneVision:
    """Build a random LLaVA-OneVision model and a byte-level tokenizer, without any download.

    Args:
        geometry: its sizes.
        seed: of the weights.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Example:
        >>> from cacovid_kernels.video_models import TinyGeometry, tiny_model
        >>> small = TinyGeometry(image_size=56, vision_width=16, vision_layers=1, width=32, layers=1)
        >>> tiny_model(small).grid(num_frames=4)
        (4, 2, 2)
    """
    tokenizer = _byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = transformers.LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": geometry.width,
            "intermediate_size": 2 * geometry.width,
            "num_hidden_layers": geometry.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "initializer_range": 0.08,  # larger than usual: logits of order 1 make the comparison sharp
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": geometry.vision_width,
            "intermediate_size": 2 * geometry.vision_width,
            "num_hidden_layers": geometry.vision_layers,
            "num_attention_heads": 2,
            "image_size": geometry.image_size,
            "patch_size": geometry.patch_size,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    network.generation_config = transformers.GenerationConfig(pad_token_id=ids["<|im_end|>"])
    return LlavaOneVision(network, tokenizer, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


def load_llava_onevision(name: str) -> LlavaOneVision:
    """Load a LLaVA-OneVision checkpoint from a folder in the layout of Hugging Face, or by its hub name.

    Raises:
        UserError: it cannot be loaded.
    """
    with loading(name):
        network = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(name, dtype="auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        images, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        mean, std = tuple(images["image_mean"]), tuple(images["image_std"])
    return LlavaOneVision(network.eval(), tokenizer, mean, std)


def _byte_tokenizer() -> Any:
    """One token per byte of UTF-8, and the chat's special tokens: any question has an encoding."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|im_end|>")
