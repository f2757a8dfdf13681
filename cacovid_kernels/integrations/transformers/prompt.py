"""A batch of prompts at full length: embeddings, positions, and where its videos lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import VISION_INPUTS, Adapter, Visual, check_axes
from cacovid_kernels.ops._checks import Grid

OP = "prune_inputs"


@dataclass(frozen=True)
class Prompt:
    """B prompts of at most L tokens, padded on the left, with V videos of N tokens in all that may be dropped.

    Attributes:
        input_ids: `[B, L]`.
        attention_mask: `[B, L]` int64.
        inputs_embeds: `[B, L, D]` as they enter the language model.
        position_ids: `[B, L]`, or `[3, B, L]` for M-RoPE.
        tokens: `[N]` position of every token that may be dropped in the flat `[B * L]`, video by video.
        grid_thw: V entries: frames, rows and columns.
        rows: V entries: the row of each video.
        lengths: B entries: real tokens of each row.
        encoded: outputs of the vision tower by modality.
    """

    input_ids: Tensor
    attention_mask: Tensor
    inputs_embeds: Tensor
    position_ids: Tensor
    tokens: Tensor
    grid_thw: Grid
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    encoded: dict[str, Any]

    @property
    def video_embeds(self) -> Tensor:
        """`[N, D]` embeddings of the tokens that may be dropped."""
        return self.inputs_embeds.flatten(0, 1)[self.tokens]

    @property
    def video_mask(self) -> Tensor:
        """`[B, L]` bool, true at the tokens that may be dropped."""
        flat = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.tokens.device)
        return flat.scatter(0, self.tokens, True).view_as(self.input_ids)


def read(model: Any, adapter: Adapter, inputs: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Prompt:
    """Run the vision tower and lay the prompts out.

    Args:
        model: the model, unwrapped.
        adapter: of its family.
        inputs: what the processor returned.
        settings: `pad_token_id` and `eos_token_id` of a call of `generate`, by default those of the model; without an
            `attention_mask` they tell padding.

    Raises:
        ValueError: an input is missing, padding is on the right, the mask hides a video, or placeholders, grids and
            features do not match.
        TypeError: an input is no tensor.
    """
    ids = inputs.get("input_ids")
    if ids is None or inputs.get(adapter.pixels) is None:
        missing = "input_ids" if ids is None else adapter.pixels
        held = sorted(name for name, value in inputs.items() if value is not None)
        raise ValueError(f"{OP}: inputs hold no {missing}, only {held}. Pass the processor's whole output.")
    check_axes("input_ids", ids, ("B", "L"))
    if adapter.pixel_axes:
        check_axes(adapter.pixels, inputs[adapter.pixels], adapter.pixel_axes)
    host_ids = ids.cpu()
    mask = _mask(inputs, host_ids, vars(model.generation_config or model.config) if settings is None else settings)
    _check(inputs, host_ids, mask)
    adapter.check_inputs(model, inputs, host_ids)
    encoded = adapter.encode(model, inputs)
    embeds = model.get_input_embeddings()(ids)
    count = 0
    for modality, output in encoded.items():
        features = adapter.features(model, output, modality, inputs)
        placeholders = host_ids == adapter.token_id(model, modality)
        if int(placeholders.sum()) != features.shape[0]:
            raise ValueError(
                f"{OP}: the prompts have {int(placeholders.sum())} {modality} placeholders, the vision tower gives "
                f"{features.shape[0]} features. Pass ids and pixels of one call of the processor."
            )
        hidden = placeholders & (mask == 0)
        if hidden.any():
            row = int(hidden.any(1).nonzero()[0])
            raise ValueError(
                f"{OP}: attention_mask hides {int(hidden[row].sum())} of the {int(placeholders[row].sum())} {modality} "
                f"placeholders of row {row}. Mask padding alone; to drop tokens pass a selector."
            )
        if modality == adapter.modality:
            count = features.shape[0]
        embeds = embeds.masked_scatter(placeholders.to(ids.device)[..., None], features.to(embeds))
    visuals = adapter.visuals(model, inputs, count)
    tokens, rows = _tokens_of_videos(host_ids == adapter.token_id(model, adapter.modality), visuals)
    if torch.isin(tokens, torch.arange(1, len(host_ids) + 1) * host_ids.shape[1] - 1).any():
        raise ValueError(f"{OP}: a prompt ends inside its video, so nothing says where to go on. Put text behind it.")
    return Prompt(
        input_ids=ids,
        attention_mask=mask.to(ids.device),
        inputs_embeds=embeds,
        position_ids=adapter.positions(model, inputs, host_ids, mask).to(ids.device),
        tokens=tokens.to(ids.device),
        grid_thw=tuple(visual.grid for visual in visuals if visual.grid is not None),
        rows=rows,
        lengths=tuple(mask.sum(1).tolist()),
        encoded=encoded,
    )


def all_tokens(prompt: Prompt) -> tuple[Tensor, tuple[int, ...]]:
    """What `choose` returns where every token stays."""
    indices = torch.arange(len(prompt.tokens), device=prompt.tokens.device)
    return indices, tuple(t * h * w for t, h, w in prompt.grid_thw)


def _mask(inputs: Mapping[str, Any], ids: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """`[B, L]` int64 on the CPU: the one given, or the one that `generate` infers from ids alone."""
    given = inputs.get("attention_mask")
    if given is not None:
        check_axes("attention_mask", given, tuple(map(str, ids.shape)))
        mask = given.cpu()
        odd = mask[(mask != 0) & (mask != 1)]
        if len(odd):
            raise ValueError(
                f"{OP}: attention_mask holds {odd[0].item()}, it must be 1 at tokens and 0 at padding. "
                f"Pass the processor's mask."
            )
        return mask.long()
    pad, ends = settings.get("pad_token_id"), settings.get("eos_token_id")
    # Where padding and the end of a text are the same token, generate takes all tokens for real ones.
    if pad is None or (ends is not None and int(pad) in torch.as_tensor(ends).flatten().tolist()):
        return torch.ones_like(ids)
    return (ids != pad).long()


def _check(inputs: Mapping[str, Any], ids: Tensor, mask: Tensor) -> None:
    for name in ("inputs_embeds", "position_ids", "past_key_values"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{OP}: inputs hold {name}, which is made here from the whole prompt. Leave it out; for a second "
                f"question on a compressed cache use next_turn."
            )
    if (mask.diff(dim=1) < 0).any():
        row = int((mask.diff(dim=1) < 0).any(1).nonzero()[0])
        told, remedy = "attention_mask", ""
        if inputs.get("attention_mask") is None:
            told, remedy = "the ids, for want of attention_mask", "Pass that mask, or pad"
        raise ValueError(
            f"{OP}: row {row} is padded on the right or inside, by {told}. {remedy or 'Pad'} on the left: "
            f'processor.tokenizer.padding_side = "left".'
        )
    known = VISION_INPUTS | {"input_ids", "attention_mask", "labels"}
    for name, value in inputs.items():
        if name not in known and isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == ids.shape:
            raise ValueError(f"{OP}: inputs hold {name} {list(value.shape)} per token, which is unknown. Leave it out.")


def _tokens_of_videos(placeholders: Tensor, visuals: list[Visual]) -> tuple[Tensor, tuple[int, ...]]:
    """Flat positions of the tokens that may be dropped, and the row of every video."""
    flat = placeholders.flatten().nonzero()[:, 0]
    sizes = [len(visual.droppable) for visual in visuals]
    if sum(sizes) != len(flat):
        grids = [visual.grid or "image" for visual in visuals]
        raise ValueError(
            f"{OP}: the prompts have {len(flat)} placeholders, {grids} need {sum(sizes)}. Pass ids, pixels and grids "
            f"of one call of the processor."
        )
    tokens, rows = [flat[:0]], []
    for number, (visual, part) in enumerate(zip(visuals, flat.split(sizes), strict=True)):
        row = set((part // placeholders.shape[1]).tolist())
        if len(row) > 1:
            raise ValueError(
                f"{OP}: visual {number} with {len(part)} placeholders would lie in the rows {sorted(row)}. "
                f"Each row must hold whole videos and images: pass ids and grids of one call of the processor."
            )
        if visual.grid is not None:
            tokens.append(part[visual.droppable])
            rows.append(row.pop())
    return torch.cat(tokens), tuple(rows)
