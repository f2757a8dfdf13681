"""Online combination space sampling as one CUDA kernel.

Frames of more than `most_combination_tokens` tokens, and frame combinations of videos of more than
`most_combination_frames` frames, are served by the reference.
"""

from __future__ import annotations

from operator import mul

import torch
from torch import Tensor

from cacovid_kernels.cuda import kernels, queue_of
from cacovid_kernels.reference import combinations as reference


def sample_combinations(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: list[int],
    num_samples: int,
    num_draw: list[int],
    num_groups: list[int],
    max_group_prob: float,
    num_frame_samples: int,
    num_frames: list[int],
    strict: bool,
    seed: int,
    step: int,
    added_steps: Tensor | None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`masks`, int32 `[num_samples, mask_words(grid_thw)]`, gets the tokens of every combination as bits."""
    c, counts = kernels(), grid_thw[::3]
    tokens = list(map(mul, grid_thw[1::3], grid_thw[2::3]))
    most_frames = max(counts, default=0) if num_frame_samples else 0
    if max(tokens, default=0) > c.most_combination_tokens or most_frames > c.most_combination_frames:
        if masks is not None:
            raise ValueError(
                f"sample_combinations: masks are for frames of at most {c.most_combination_tokens} tokens and videos "
                f"of at most {c.most_combination_frames} frames (grid_thw={grid_thw}). Call without them."
            )
        return reference.sample_combinations(
            token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, max_group_prob,
            num_frame_samples, num_frames, strict, seed, step, added_steps,
        )  # fmt: skip
    device, frames, videos = token_scores.device, sum(counts), len(num_draw)
    outs = (
        torch.empty(num_samples, sum(map(mul, counts, num_draw)), dtype=torch.int64, device=device),
        torch.empty(num_samples, frames, dtype=torch.int64, device=device),
        torch.empty(num_samples, frames, dtype=torch.float32, device=device),
        torch.empty(num_frame_samples, sum(num_frames), dtype=torch.int64, device=device),
        torch.empty(num_frame_samples, videos, dtype=torch.float32, device=device),
        torch.empty(frames, dtype=torch.int32, device=device),
        torch.empty(videos if num_frame_samples else 0, dtype=torch.int32, device=device),
    )
    caps = [reference.group_cap(groups, max_group_prob) for groups in num_groups]
    c.sample_combinations(
        token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, caps, num_frame_samples,
        num_frames, strict, seed, step, added_steps, *outs, masks, *queue_of(device),
    )  # fmt: skip
    return outs


def mask_words(grid_thw: list[int]) -> int:
    """Columns of the bit-packed masks: those of every frame start at a word of their own (`cuda.h`)."""
    return sum(t * -(-h * w // 32) for t, h, w in zip(*(grid_thw[i::3] for i in range(3)), strict=True))
