"""Budget, selection and segmented top-k on the CPU engine."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.native import CPU, engine, num_threads
from cacovid_kernels.native.gather import gather_rows
from cacovid_kernels.reference.select import kept_by


def allocate_budget(
    frame_scores: Tensor,
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    counts = torch.empty(sum(grid_thw[::3]), dtype=torch.int64, device=CPU)
    frame_status = torch.empty(sum(grid_thw[::3]), dtype=torch.int32, device=CPU)
    engine().allocate_budget(
        frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, counts, frame_status
    )
    return counts, frame_status


def select_tokens(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool,
    by_score: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.empty(sum(num_keep), dtype=torch.int64, device=CPU)
    frame_counts = torch.empty(sum(grid_thw[::3]), dtype=torch.int64, device=CPU)
    frame_status = torch.empty(sum(grid_thw[::3]), dtype=torch.int32, device=CPU)
    engine().select_tokens(
        token_scores, frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio,
        strict, fill, by_score, num_threads(), indices, frame_counts, frame_status,
    )  # fmt: skip
    return indices, frame_counts, frame_status


def select_kept(*args):
    return kept_by(select_tokens, gather_rows, *args)


def segmented_topk(scores: Tensor, cu_seqlens: list[int], k: list[int], by_score: bool) -> tuple[Tensor, Tensor]:
    indices = torch.empty(sum(k), dtype=torch.int64, device=CPU)
    status = torch.empty(len(k), dtype=torch.int32, device=CPU)
    engine().segmented_topk(scores, cu_seqlens, k, by_score, num_threads(), indices, status)
    return indices, status
