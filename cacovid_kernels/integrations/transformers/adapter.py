"""What the library has to know about a model family, and what all families share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OLDEST = "5.10"  # transformers; what a newer one brought is named where it is needed

# Everything of a processor that describes pixels or placeholders: read here, meaningless after compaction.
VISION_INPUTS = frozenset(
    {
        "pixel_values",
        "pixel_values_videos",
        "pixel_values_images",
        "pixel_attention_mask",
        "image_sizes",
        "image_sizes_videos",
        "batch_num_images",
        "image_grid_thw",
        "video_grid_thw",
        "image_merge_sizes",
        "video_merge_sizes",
        "video_compression_mask",
        "second_per_grid_ts",
        "mm_token_type_ids",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "visuals",
    }
)


_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
_PIXEL_NAMES = {name for names in _PIXELS.values() for name in names}


@dataclass(frozen=True)
class Visual:
    """A video or an image among the placeholders of a batch.

    Attributes:
        grid: frames, rows and columns of the tokens that may be dropped; None for an image, which stays whole.
        droppable: `[n]` bool on the CPU, one entry per placeholder; false for newlines and class tokens.
    """

    grid: tuple[int, int, int] | None
    droppable: Tensor

    @classmethod
    def video(cls, grid: tuple[int, int, int], *, class_tokens: int = 0, newlines: int = 0) -> Visual:
        """A video whose frames start with class tokens and that ends with newlines."""
        frames, rows, columns = grid
        frame = torch.arange(class_tokens + rows * columns) >= class_tokens
        return cls(grid, torch.cat([frame.repeat(frames), torch.zeros(newlines, dtype=torch.bool)]))

    @classmethod
    def image(cls, num_tokens: int) -> Visual:
        return cls(None, torch.zeros(num_tokens, dtype=torch.bool))


def square(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of a frame from a tower with square inputs; one row if they are no square."""
    side = math.isqrt(num_tokens)
    return (side, side) if side * side == num_tokens else (1, num_tokens)


def installed() -> str:
    """Version of transformers."""
    import transformers

    return transformers.__version__


class Adapter:
    """One model family. Subclass it, name `family` and `model_types`, and write `visuals`.

    Methods take the `...ForConditionalGeneration` model, never change it, and read the processor's `inputs`.
    Placeholders are the tokens of the prompt whose embeddings come from the vision tower.
    """

    family: str
    model_types: tuple[str, ...]
    modality = "video"  # whose features hold the video: "image" where the processor makes no difference
    pixels = "pixel_values_videos"
    pixel_axes: tuple[str, ...] = ()  # axes of these pixels; with none given any are taken
    embeddings_suffice = True  # `pack` needs nothing of the vision tower's outputs

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        """What the placeholders of `modality` are, in their order over the whole batch.

        Args:
            model: the model.
            inputs: the processor's inputs.
            num_features: features of `modality` over all videos.
        """
        raise NotImplementedError

    def check(self, model: Any) -> None:
        """RuntimeError when the installed transformers lacks an entry point."""
        if not hasattr(model.base_model, f"get_{self.modality}_features"):
            raise RuntimeError(
                f"prune_inputs: {type(model.base_model).__name__} of transformers {installed()} has no "
                f"get_{self.modality}_features. Use transformers >= {OLDEST}."
            )

    def token_id(self, model: Any, modality: str) -> int:
        """Id of the placeholder of a modality."""
        return getattr(model.config, f"{modality}_token_id")

    def check_inputs(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> None:
        """ValueError or TypeError for inputs that do not belong together, before the vision tower runs.

        Args:
            model: the model.
            inputs: the processor's inputs.
            ids: `[B, L]` on the CPU.
        """

    def encode(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of the vision tower and projector by modality, each with its `pooler_output`."""
        outputs = {}
        for modality, names in _PIXELS.items():
            pixels = next((inputs[name] for name in names if inputs.get(name) is not None), None)
            if pixels is not None:
                # The first argument is the pixels; its name has changed between versions of transformers.
                function = getattr(model.base_model, f"get_{modality}_features")
                known = inspect.signature(function).parameters.keys() - _PIXEL_NAMES
                given = {name: inputs[name] for name in known if inputs.get(name) is not None}
                outputs[modality] = function(pixels, **given, return_dict=True)
        return outputs

    def features(self, model: Any, output: Any, modality: str, inputs: Mapping[str, Any]) -> Tensor:
        """`[N, D]` features of one modality, one row per placeholder."""
        pooled = output.pooler_output
        parts = [pooled] if isinstance(pooled, Tensor) else pooled
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def positions(self, model: Any, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
        """Rotary positions at full length, on the CPU.

        Args:
            model: the model.
            inputs: the processor's inputs.
            ids: `[B, L]` on the CPU.
            mask: `[B, L]` int64 attention mask on the CPU.

        Returns:
            `[B, L]`, counted along the mask, or `[3, B, L]` for M-RoPE.
        """
        return counted(mask)

    def last_attention(self, model: Any) -> Any:
        """Attention of the language model's last layer, whose queries score a prompt that has been read.

        It has `q_proj`, possibly `q_norm`, `head_dim`, `scaling` and `layer_idx`, and turns halves (`rotate_half`).
        """
        return model.get_decoder().layers[-1].self_attn

    def pack(self, model: Any, prompt: Any) -> dict[str, Any]:
        """What carries the tokens of a compacted prompt into the model (`prompt`: a `prune.Compacted`)."""
        return {"inputs_embeds": prompt.inputs_embeds}


def check_axes(name: str, x: Any, axes: Sequence[str]) -> None:
    """An input with these axes, where digits are sizes: TypeError if it is no tensor, ValueError for another shape."""
    wanted = f"[{', '.join(axes)}]"
    if not isinstance(x, Tensor):
        raise TypeError(
            f"prune_inputs: {name} is a {type(x).__name__}, it must be a tensor {wanted}. "
            f"Pass return_tensors='pt' to the processor."
        )
    sizes = [int(axis) if axis.isdigit() else n for axis, n in zip(axes, x.shape, strict=False)]
    if list(x.shape) != sizes or len(sizes) != len(axes):
        raise ValueError(
            f"prune_inputs: {name} {list(x.shape)} must be {wanted}. "
            f"Pass what the processor returns with return_tensors='pt'."
        )


def counted(mask: Tensor) -> Tensor:
    """`[B, L]` positions along an attention mask, 0 at padding: what `generate` counts."""
    return (mask.cumsum(1) - 1).clamp(min=0)
