"""Online combination space sampling on the CPU engine."""

from __future__ import annotations

from operator import mul

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads
from cacovid_kernels.native.sample import step_of
from cacovid_kernels.reference.combinations import group_cap


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts = grid_thw[::3]
    frames = sum(counts)
    drawn = sum(map(mul, counts, num_draw))
    indices = torch.empty(num_samples, drawn, dtype=torch.int64, device=CPU)
    groups = torch.empty(num_samples, frames, dtype=torch.int64, device=CPU)
    log_prob = torch.empty(num_samples, frames, dtype=torch.float32, device=CPU)
    frame_indices = torch.empty(num_frame_samples, sum(num_frames), dtype=torch.int64, device=CPU)
    frame_log_prob = torch.empty(num_frame_samples, len(num_draw), dtype=torch.float32, device=CPU)
    frame_status = torch.empty(frames, dtype=torch.int32, device=CPU)
    frame_draw_status = torch.empty(len(num_draw) if num_frame_samples else 0, dtype=torch.int32, device=CPU)
    caps = [group_cap(groups, max_group_prob) for groups in num_groups]
    engine().sample_combinations(
        token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, caps, num_frame_samples,
        num_frames, strict, seed, step_of(step, added_steps), num_threads(), indices, groups, log_prob, frame_indices,
        frame_log_prob, frame_status, frame_draw_status,
    )  # fmt: skip
    return indices, groups, log_prob, frame_indices, frame_log_prob, frame_status, frame_draw_status
