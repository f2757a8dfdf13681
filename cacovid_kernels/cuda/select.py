"""Budget, selection and segmented top-k as CUDA kernels, one launch each."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from cacovid_kernels._bits import as_bits
from cacovid_kernels._words import sort_words
from cacovid_kernels.cuda import kernels, queue_of


def allocate_budget(
    frame_scores: Tensor,
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    counts, frame_status = _of_frames(frame_scores, grid_thw)
    kernels().allocate_budget(
        frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict,
        _scratch(frame_scores, grid_thw), counts, frame_status, *queue_of(frame_scores.device),
    )  # fmt: skip
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
    indices = torch.empty(sum(num_keep), dtype=torch.int64, device=token_scores.device)
    frame_counts, frame_status = _of_frames(token_scores, grid_thw)
    kernels().select_tokens(
        token_scores, frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill,
        by_score, _scratch(token_scores, grid_thw), indices, frame_counts, frame_status,
        *queue_of(token_scores.device),
    )  # fmt: skip
    if by_score:
        _sort_runs(indices, [t * h * w for t, h, w in _videos(grid_thw)], num_keep)
    return indices, frame_counts, frame_status


def select_kept(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool,
    tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept positions [K] int64, kept tokens [F] int64 and status bits [F] int32 per frame, bounds of the videos among
    the kept [B + 1] int32, mask [N] bool, frame, row and column within the video [3, K] int64, kept rows of `tokens`.
    """
    device, kept = token_scores.device, sum(num_keep)
    indices = torch.empty(kept, dtype=torch.int64, device=device)
    frame_counts, frame_status = _of_frames(token_scores, grid_thw)
    # Without a video there is no kernel that writes the first bound.
    cu_seqlens = (torch.empty if num_keep else torch.zeros)(len(num_keep) + 1, dtype=torch.int32, device=device)
    mask = torch.empty(token_scores.numel(), dtype=torch.bool, device=device)
    positions = torch.empty(3, kept, dtype=torch.int64, device=device)
    if tokens is None:
        rows = torch.empty(0, dtype=token_scores.dtype, device=device)
    else:
        tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
        rows = torch.empty(kept, tokens.shape[1], dtype=tokens.dtype, device=device)
    kernels().select_kept(
        token_scores, frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill,
        None if tokens is None else as_bits(tokens), _scratch(token_scores, grid_thw), indices, frame_counts,
        frame_status, cu_seqlens, mask, positions, as_bits(rows), *queue_of(device),
    )  # fmt: skip
    return indices, frame_counts, frame_status, cu_seqlens, mask, positions, rows


def segmented_topk(scores: Tensor, cu_seqlens: list[int], k: list[int], by_score: bool) -> tuple[Tensor, Tensor]:
    indices = torch.empty(sum(k), dtype=torch.int64, device=scores.device)
    status = torch.empty(len(k), dtype=torch.int32, device=scores.device)
    kernels().segmented_topk(scores, cu_seqlens, k, by_score, indices, status, *queue_of(scores.device))
    if by_score:
        _sort_runs(indices, [b - a for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)], k)
    return indices, status


def _videos(grid_thw: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True))


def _of_frames(scores: Tensor, grid_thw: list[int]) -> tuple[Tensor, Tensor]:
    """Empty counts [F] int64 and status [F] int32."""
    frames, device = sum(grid_thw[::3]), scores.device
    return (
        torch.empty(frames, dtype=torch.int64, device=device), torch.empty(frames, dtype=torch.int32, device=device),
    )  # fmt: skip


def _scratch(scores: Tensor, grid_thw: list[int]) -> Tensor | None:
    """Memory for the budgets of videos of very many frames."""
    entries = kernels().budget_scratch(grid_thw)
    return torch.empty(entries, dtype=torch.int64, device=scores.device) if entries else None


def _sort_runs(words: Tensor, lengths: list[int], kept: list[int]) -> None:
    """Turns rank words into positions, videos of one length and number of kept tokens at a time."""
    first = out = 0
    for (length, k), run in groupby(zip(lengths, kept, strict=True)):
        count = len(list(run))
        sort_words(words[out : out + count * k].view(count, k), first, length)
        first, out = first + count * length, out + count * k
