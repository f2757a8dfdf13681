"""Budget, selection and uniform fill in one launch, a program per frame.

Where a frame's tokens go follows from the budgets of its video alone, so every program computes these for itself and
none has to wait for another. Videos of more than `MOST_FRAMES` frames get their budgets from a launch of their own;
frames of more than `LONGEST_FRAME` tokens are cut into chunks (`radix`).
"""

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels._words import sort_words
from cacovid_kernels.reference.select import kept_by, video_ratios
from cacovid_kernels.triton import radix, topk
from cacovid_kernels.triton.budget import (
    BudgetPlan,
    frame_flags,
    load_frame_scores,
    plan_budget,
    video_budget,
    video_budgets,
)
from cacovid_kernels.triton.exact import order_key, rank_word
from cacovid_kernels.triton.fill import fill_below
from cacovid_kernels.triton.gather import gather_rows
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.radix import counts_before
from cacovid_kernels.triton.topk import kept_positions, kth_largest, segmented_topk, status_bits

LONGEST_FRAME = 4096
MOST_FRAMES = 2048
# Per thread, enough for 16 warps. Without a limit ptxas aims at more programs per multiprocessor than there are, and
# spills a register for it.
REGISTERS = 128


@triton.jit
def _store_kept(
    indices, first_out, first_token, position, inside, key, ranked, ranked_before, count, last, step, picks_per_token,
    FLOAT_RANKS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Stores the tokens of a video that are ranked or fill up, at their `position`s or as rank words; says which."""
    picks_before, picked = fill_below(position - ranked_before, count, last, step, picks_per_token, FLOAT_RANKS)
    kept = inside & (ranked | picked)
    value = rank_word(key, position) if WORDS else first_token + position
    tl.store(indices + (first_out + ranked_before + picks_before), value, mask=kept)
    return kept


@triton.jit(
    do_not_specialize=[
        "first_score", "row_stride", "frame_stride", "first_token", "first_frame", "first_out", "frames", "tokens",
        "num_keep", "num_ranked", "cap", "quota", "low", "high", "count", "last", "step", "picks_per_token",
    ]
)  # fmt: skip
def _frames_kernel(
    token_scores, frame_scores, budget, before, indices, frame_counts, frame_status,
    first_score: tl.int64, row_stride: tl.int64, stride, frame_stride: tl.int64,
    first_token: tl.int64, first_frame: tl.int64, first_out: tl.int64, frames, tokens, num_keep: tl.int64,
    num_ranked, cap, quota: tl.int64, low: tl.int64, high: tl.int64,
    count, last, step: tl.int64, picks_per_token: tl.int64,
    FLOAT_RANKS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, LEVEL_BITS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    frame, video = tl.program_id(0) % frames, row // frames
    i = tl.arange(0, BLOCK_P)
    inside = i < tokens
    scores = token_scores + first_score + row * row_stride
    token = tl.load(scores + i.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    if budget is None:
        f = tl.arange(0, BLOCK_T)
        importance = load_frame_scores(frame_scores, first_frame + video * frames + f, f < frames, frame_stride)
        counts = video_budget(importance, f < frames, tokens, num_ranked, cap, quota, low, high, LEVEL_BITS)
        k, earlier = tl.sum(tl.where(f == frame, counts, 0), 0), tl.sum(tl.where(f < frame, counts, 0), 0)
        status = frame_flags(load_frame_scores(frame_scores, first_frame + row, frame < frames, frame_stride))
    else:
        frame = frame.to(tl.int64)  # a video this long has positions beyond 2^31
        k, earlier = tl.load(budget + first_frame + row).to(tl.int32), tl.load(before + first_frame + row)
        status = tl.load(frame_status + first_frame + row)
    key = tl.where(inside, order_key(token), 0)  # what is no token ranks last: after NaN, by its position
    digits = key >> (32 - BITS)
    threshold, ties = kth_largest(digits, k, BITS)
    ranked, at = kept_positions(digits > threshold, digits == threshold, ties, 0, 0)
    kept = _store_kept(
        indices, first_out + video * num_keep, first_token + video * frames * tokens, frame * tokens + i, inside, key,
        ranked, earlier + at, count, last, step, picks_per_token, FLOAT_RANKS, WORDS,
    )  # fmt: skip
    tl.store(frame_counts + first_frame + row, tl.sum(kept.to(tl.int32), 0).to(tl.int64))
    tl.store(frame_status + first_frame + row, status | status_bits(token))


@triton.jit(
    do_not_specialize=[
        "first_token", "first_frame", "first_out", "frames", "tokens", "num_keep", "chunks", "count", "last", "step",
        "picks_per_token",
    ]
)  # fmt: skip
def _chunks_kernel(
    keys, thresholds, ties, above, equal, budget, before, indices, frame_counts,
    first_token: tl.int64, first_frame: tl.int64, first_out: tl.int64, frames: tl.int64, tokens: tl.int64,
    num_keep: tl.int64, chunks: tl.int64, count: tl.int64, last: tl.int64, step: tl.int64, picks_per_token: tl.int64,
    FLOAT_RANKS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0).to(tl.int64) % chunks
    frame, video = row % frames, row // frames
    k, earlier = tl.load(budget + first_frame + row), tl.load(before + first_frame + row)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = i < tokens
    key = tl.load(keys + row * tokens + i, mask=inside, other=0).to(tl.uint32, bitcast=True)
    threshold = tl.load(thresholds + row).to(tl.uint32)
    ranked, at = kept_positions(
        key > threshold, inside & (key == threshold), tl.load(ties + row),
        counts_before(above + row * chunks, chunk), counts_before(equal + row * chunks, chunk),
    )  # fmt: skip
    _store_kept(
        indices, first_out + video * num_keep, first_token + video * frames * tokens, frame * tokens + i, inside, key,
        ranked, earlier + at, count, last, step, picks_per_token, FLOAT_RANKS, WORDS,
    )  # fmt: skip
    if chunk == 0:
        unranked = frame * tokens - earlier
        start, _ = fill_below(unranked, count, last, step, picks_per_token, FLOAT_RANKS)
        end, _ = fill_below(unranked + tokens - k, count, last, step, picks_per_token, FLOAT_RANKS)
        tl.store(frame_counts + first_frame + row, k + end - start)


def _plans(
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool,
) -> list[tuple[BudgetPlan, int]]:
    """Plans of consecutive videos, equal ones once with their number: a run of them needs one launch."""
    grids = list(zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True))
    ratios = video_ratios(grids, num_keep, keep_ratio, max_frame_ratio)
    plans = [
        plan_budget(grid, kept, ratio, importance_ratio, cap, strict, fill)
        for grid, kept, (ratio, cap) in zip(grids, num_keep, ratios, strict=True)
    ]
    return [(plan, len(list(run))) for plan, run in groupby(plans)]


def allocate_budget(
    frame_scores: Tensor,
    grid_thw: list[int],
    num_keep: list[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """Ranked tokens per frame [F] int64 and status bits of its score [F] int32."""
    scores = frame_scores.reshape(-1)
    counts = torch.empty(scores.numel(), dtype=torch.int64, device=scores.device)
    frame_status = torch.empty(scores.numel(), dtype=torch.int32, device=scores.device)
    first = 0
    for plan, videos in _plans(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, True):
        video_budgets(scores, plan, videos, scores.stride(0), first, counts, frame_status)
        first += videos * plan.frames
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
    """Kept positions [K] int64, kept tokens per frame [F] int64, status bits of each frame's scores [F] int32."""
    device, frames = token_scores.device, sum(grid_thw[::3])
    indices = torch.empty(sum(num_keep), dtype=torch.int64, device=device)
    frame_counts = torch.empty(frames, dtype=torch.int64, device=device)
    frame_status = torch.empty(frames, dtype=torch.int32, device=device)
    scores = token_scores.flatten(0, 1) if token_scores.dim() == 3 else token_scores
    frame_scores = None if frame_scores is None else frame_scores.reshape(-1)
    token = frame = out = 0
    for plan, videos in _plans(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill):
        kept, tokens = videos * plan.num_keep, videos * plan.tokens
        _select_run(
            scores, frame_scores, plan, videos, (token, frame, out), indices, frame_counts, frame_status, by_score
        )
        if by_score:
            sort_words(indices[out : out + kept].view(videos, plan.num_keep), token, plan.tokens)
        token, frame, out = token + tokens, frame + videos * plan.frames, out + kept
    return indices, frame_counts, frame_status


def select_kept(*args):
    return kept_by(select_tokens, gather_rows, *args)


def _select_run(
    scores: Tensor,
    frame_scores: Tensor | None,
    plan: BudgetPlan,
    videos: int,
    first: tuple[int, int, int],
    indices: Tensor,
    frame_counts: Tensor,
    frame_status: Tensor,
    words: bool,
) -> None:
    """Selects from equally planned videos; `first` counts tokens, frames and kept tokens before them."""
    token, frame, _ = first
    rows, size = videos * plan.frames, plan.tokens_per_frame
    stride = scores.stride(-1)
    # Packed rows follow each other; those of a dense tensor are addressed by number.
    row_stride, offset = (size * stride, token * stride) if scores.dim() == 1 else (s := scores.stride(0), frame * s)
    frame_stride = 0 if frame_scores is None else frame_scores.stride(0)
    budget = before = None
    if size > LONGEST_FRAME or plan.frames > MOST_FRAMES:
        budget = torch.empty_like(frame_counts)
        before = video_budgets(frame_scores, plan, videos, frame_stride, frame, budget, frame_status)
    if budget is not None and size > LONGEST_FRAME:
        chunks = triton.cdiv(size, radix.CHUNK)
        view = scores.as_strided((rows, size), (row_stride, stride), scores.storage_offset() + offset)
        flags = torch.zeros(2, rows, dtype=torch.int32, device=scores.device)
        keys = topk.row_keys(view, 0, rows, flags, noise=False)
        frame_status[frame : frame + rows] |= flags[0]
        launch(
            _chunks_kernel, (rows * chunks,), keys, *radix.row_thresholds(keys, budget[frame : frame + rows]), budget,
            before, indices, frame_counts, *first, plan.frames, size, plan.num_keep, chunks, *plan.picks(),
            num_warps=16, maxnreg=REGISTERS, FLOAT_RANKS=plan.float_ranks, WORDS=words, CHUNK=radix.CHUNK,
        )  # fmt: skip
        return
    block_p, block_t = block(size), block(plan.frames) if budget is None else 1
    # Positions in a video whose budget is known by now may need 64 bits, and with them twice the registers.
    warps = max(block_t // 128, block_p // (256 if budget is None else 128))
    launch(
        _frames_kernel, (rows,), scores, frame_scores, budget, before, indices, frame_counts, frame_status, offset,
        row_stride, stride, frame_stride, *first, plan.frames, size, plan.num_keep, *plan.shares(), *plan.picks(),
        num_warps=max(1, min(16, warps)), maxnreg=REGISTERS, FLOAT_RANKS=plan.float_ranks, WORDS=words,
        BITS=topk.key_bits(scores.dtype), LEVEL_BITS=block_p.bit_length(), BLOCK_T=block_t, BLOCK_P=block_p,
    )  # fmt: skip


__all__ = ["allocate_budget", "segmented_topk", "select_kept", "select_tokens"]
