"""Compaction of prompts before the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import VISION_INPUTS, Adapter, counted
from cacovid_kernels.integrations.transformers.prompt import OP, Prompt, read
from cacovid_kernels.integrations.transformers.registry import adapter_of, unwrapped
from cacovid_kernels.integrations.transformers.selectors import Selector, check_selector, choose
from cacovid_kernels.ops.gather import gather_tokens

_MADE_HERE = VISION_INPUTS | {"input_ids", "attention_mask", "labels"}
_IGNORED = -100  # labels without a loss


@dataclass(frozen=True)
class Compacted:
    """B prompts of at most L' tokens, padded on the left.

    Attributes:
        input_ids: `[B, L']`.
        attention_mask: `[B, L']` int64.
        inputs_embeds: `[B, L', D]`.
        position_ids: `[B, L']`, or `[4, B, L']` for M-RoPE.
        indices: `[K]` kept ones among the N tokens that could be dropped.
        lengths: how many of each video.
        encoded: outputs of the vision tower by modality, at full length.
    """

    input_ids: Tensor
    attention_mask: Tensor
    inputs_embeds: Tensor
    position_ids: Tensor
    indices: Tensor
    lengths: tuple[int, ...]
    encoded: dict[str, Any]


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    selector: Selector,
    *,
    keep_ratio: float | None = None,
    num_tokens: Any = None,
    labels: Tensor | None = None,
    budget: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Drops video tokens of processed prompts and returns what the model needs to go on without them.

    The model is not changed. What it computes on the result is what it would compute at full length if nobody
    saw the dropped tokens: the rest keeps its embeddings and its positions.

    Args:
        model: a `...ForConditionalGeneration` of transformers; docs/integrations.md lists the families.
        inputs: what the model's processor returned: `input_ids [B, L]`, pixels, grids, `attention_mask` (1 and 0,
            padding on the left; without it padding is told by its id, as `generate` does). Several videos and images
            per prompt are fine; images stay whole. InternVL and SmolVLM2 need `inputs["visuals"]`, a list of
            ("video", frames) and ("image", tiles), unless every prompt is one video.
        selector: chooses what stays. A `CompressionPolicy`; `divprune`, `evs` or `vidcom2` of
            `cacovid_kernels.compressors`; or a function of `(embeddings [N, D], grid_thw)`, the video tokens of one
            prompt as the language model gets them and (frames, rows, columns) of its videos, that returns scores
            `[N]`, larger = kept first.
        keep_ratio: share of each video's tokens that is kept, in (0, 1].
        num_tokens: tokens kept per video instead, one number or one per video.
        labels: `[B, L]` for training, compacted like the tokens; -100 at padding. May also stand in `inputs`.
        budget: "frames" gives each frame a budget (`select_tokens`), the default for a policy; "video" keeps the best
            of the whole video (`topk_tokens`), the default for a function. Compressors have their own.
        options: of `select_tokens` (`importance_ratio`, `max_frame_ratio`, `fill`, `mode`, `check`) or of `topk_tokens`
            (`check`). Without `check` scores that are NaN are refused. That reads a value on the host, which reads
            grids and lengths of these prompts anyway; `check="flag"` ranks NaN last instead.

    Returns:
        Arguments of `model.generate(**out)` and `model(**out)`: `inputs_embeds [B, L', D]` (Qwen3-VL: `input_ids` and
        `mm_encoder_outputs`), `position_ids [B, L']` or `[4, B, L']`, `attention_mask [B, L']`, `labels` if given,
        and what `inputs` held besides. Where the embeddings need gradients, these flow back through the kept tokens.
        Generation from `inputs_embeds` returns the new tokens alone.

    Raises:
        ValueError: an unknown model, a prompt that does not fit its videos, padding on the right, a count that
            cannot be kept, scores that are no numbers; one line says which.
        TypeError: an input is no tensor, or a count no number.
        RuntimeError: the installed transformers lacks an entry point; the line names the versions that have it.

    Example:
        >>> import torch
        >>> from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
        >>> from cacovid_kernels.integrations.transformers import prune_inputs
        >>> text = {"model_type": "qwen2", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64,
        ...         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "patch_size": 4,
        ...           "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "vision_use_head": False}
        >>> config = LlavaOnevisionConfig(text_config=text, vision_config=vision, image_token_index=97,
        ...                               video_token_index=98, vision_feature_layer=-1,
        ...                               vision_feature_select_strategy="full")
        >>> model = LlavaOnevisionForConditionalGeneration(config).eval()
        >>> inputs = {"input_ids": torch.tensor([[1, 2] + [98] * (3 * 4 + 1) + [3, 4]]),
        ...           "pixel_values_videos": torch.randn(1, 3, 3, 16, 16)}
        >>> out = prune_inputs(model, inputs, lambda x, grid: x.norm(dim=-1), keep_ratio=0.5)
        >>> out["inputs_embeds"].shape
        torch.Size([1, 11, 32])
        >>> model.generate(**out, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape
        torch.Size([1, 4])
    """
    model = unwrapped(model)
    adapter = adapter_of(model)
    check_selector(selector, keep_ratio, num_tokens, budget, options)
    prompt = read(model, adapter, inputs)
    compacted, index = compact(prompt, *choose(selector, prompt, keep_ratio, num_tokens, budget, options))
    out = arguments(model, adapter, inputs, compacted)
    labels = inputs.get("labels") if labels is None else labels
    if labels is not None:
        if labels.shape != prompt.input_ids.shape:
            raise ValueError(
                f"{OP}: labels {list(labels.shape)} must have the shape of input_ids {list(prompt.input_ids.shape)}."
            )
        out["labels"] = gather_tokens(labels.flatten(), index, dim=0, pad_value=_IGNORED)
    return out


def arguments(model: Any, adapter: Adapter, inputs: Mapping[str, Any], compacted: Compacted) -> dict[str, Any]:
    """Arguments of the model for a compacted prompt."""
    kept = {name: value for name, value in inputs.items() if name not in _MADE_HERE}
    # An explicit mask even where nothing is masked: without one, gaps in the positions would be read as the
    # borders of packed sequences.
    made = {"position_ids": compacted.position_ids, "attention_mask": compacted.attention_mask}
    return {**kept, **adapter.pack(model, compacted), **made}


def compact(prompt: Prompt, indices: Tensor, kept: tuple[int, ...]) -> tuple[Compacted, Tensor]:
    """The prompts without the video tokens that are not in `indices` `[K]`, and the index `[B, L']` that made them."""
    lengths = list(prompt.lengths)
    for row, k, (t, h, w) in zip(prompt.rows, kept, prompt.grid_thw, strict=True):
        lengths[row] -= t * h * w - k
    index = _left_padded(prompt, indices, lengths)
    return take(flat(prompt), index, indices, kept, prompt.encoded), index


class Flat(NamedTuple):
    """Tokens of prompts one after another.

    Attributes:
        input_ids: `[M]`.
        inputs_embeds: `[M, D]`.
        position_ids: `[M]`, or `[3, M]` for M-RoPE.
        attention_mask: `[M]` int64.
    """

    input_ids: Tensor
    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor


def flat(prompt: Prompt) -> Flat:
    """The tokens of a batch of prompts, padding among them."""
    return Flat(
        prompt.input_ids.flatten(),
        prompt.inputs_embeds.flatten(0, 1),
        prompt.position_ids.flatten(-2),
        prompt.attention_mask.flatten(),
    )


def take(tokens: Flat, index: Tensor, indices: Tensor, kept: tuple[int, ...], encoded: dict[str, Any]) -> Compacted:
    """Prompts of the tokens at `index` `[B, L']`, ascending in each row, -1 in front as padding.

    `indices`, `kept` and `encoded` are those of `Compacted`.
    """
    axes = [0, 0, tokens.position_ids.dim() - 1, 0]
    ids, embeds, positions, mask = gather_tokens(list(tokens), index, dim=axes)
    text = counted(mask)
    if positions.dim() == 3:
        # The first row serves masks alone. Were it a row of M-RoPE, its jumps back would be read as the starts of
        # packed sequences.
        positions = torch.cat([text[None], positions])
    else:
        # Where a prompt starts with its video the first kept token need not be at 0, but variable-length attention
        # finds the start of a sequence by its position 0. Rotary attention sees differences alone.
        first = positions.masked_fill(mask == 0, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        positions = (positions - first).masked_fill(mask == 0, 0)
    return Compacted(ids, mask, embeds, positions, indices, kept, encoded)


def _left_padded(prompt: Prompt, indices: Tensor, lengths: list[int]) -> Tensor:
    """`[B, L']` flat positions of what stays, padded with -1 on the left. No host read."""
    rows, full = prompt.input_ids.shape
    longest, device = max(lengths), indices.device
    flat = (prompt.attention_mask != 0).flatten().scatter(0, prompt.tokens, False)
    keep = flat.scatter(0, prompt.tokens[indices], True).view(rows, full)
    # What stays moves to its rank, counted from the right end; what goes is written to one column too many.
    column = longest - keep.flip(1).cumsum(1).flip(1)
    column = torch.where(keep, column, longest)
    source = torch.arange(rows * full, device=device).view(rows, full)
    return torch.full((rows, longest + 1), -1, device=device).scatter(1, column, source)[:, :longest]
