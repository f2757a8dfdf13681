"""Checks of a batch of prompts before a policy reads it."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import Grid, check_scores, describe
from cacovid_kernels.ops.score import check_dtype


def check_prompt(
    weight: Tensor,
    inputs_embeds: Tensor,
    video_mask: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Arguments fit each other and a policy whose norm has this `weight` `[D]`; one line says where not."""
    op = "CompressionPolicy"
    check_scores(op, "inputs_embeds", inputs_embeds)
    check_dtype(op, "inputs_embeds", inputs_embeds, weight.dtype)
    size = weight.shape[0]
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != size:
        raise ValueError(f"{op}: inputs_embeds must be [B, L, D={size}] (inputs_embeds: {describe(inputs_embeds)}).")
    rows, length = inputs_embeds.shape[:2]
    if video_mask.dtype != torch.bool or video_mask.shape != (rows, length):
        raise ValueError(f"{op}: video_mask must be bool [B={rows}, L={length}] (video_mask: {describe(video_mask)}).")
    if attention_mask is not None and attention_mask.shape != (rows, length):
        raise ValueError(
            f"{op}: attention_mask must be [B={rows}, L={length}], nonzero for real tokens "
            f"(attention_mask: {describe(attention_mask)})."
        )
    if position_ids is not None and position_ids.shape not in ((rows, length), (1, length)):
        raise ValueError(
            f"{op}: position_ids must be [B={rows}, L={length}], one position per token "
            f"(position_ids: {describe(position_ids)}). Leave 3-D rotary positions out."
        )


def check_whole_videos(video_mask: Tensor, grid: Grid) -> None:
    """Each row of the mask holds whole videos. Only on the CPU: elsewhere looking would synchronise."""
    if video_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = {0, *accumulate(t * h * w for t, h, w in grid)}
    marked = video_mask.sum(1).tolist()
    filled = list(accumulate(marked))
    if filled[-1:] != [max(ends)] or not ends.issuperset(filled):
        raise ValueError(
            f"CompressionPolicy: video_mask marks {marked} tokens per row, which must be whole videos of "
            f"grid_thw={list(grid)}. Mark the video tokens alone, no separator, newline or padding."
        )
