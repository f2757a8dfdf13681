"""Budget, selection and segmented top-k: the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from cacovid_kernels._masks import masked_positions
from cacovid_kernels._numbers import numbers_on
from cacovid_kernels.reference import gather
from cacovid_kernels.reference.exact import exp_exact, from_fixed, order_key, ranking, to_fixed
from cacovid_kernels.selection import kept_mask, kept_positions

NAN, POSINF = 1, 2


def status_of(rows: Tensor) -> Tensor:
    """Status bits of every row of scores: `[R, P]` -> int32 [R]."""
    nan, posinf = torch.isnan(rows).any(1), (rows == math.inf).any(1)
    return (nan * NAN + posinf * POSINF).int()


def _frame_weights(scores: Tensor, lowest: float, highest: float) -> Tensor:
    """[T] frame scores -> [T] fixed-point weights: softmax of scores scaled to [-3, 3], clipped."""
    x = scores.double()
    finite = torch.isfinite(x)
    largest = torch.where(finite, x.abs(), 0.0).amax()
    logit = torch.where(largest > 0, x / largest * 3.0, 0.0)
    logit = torch.where(finite, logit, -math.inf)  # -inf and NaN: weight 0 before the clip
    logit = torch.where(x == math.inf, 3.0, logit)
    e = torch.where(logit.amax() >= -3.0, exp_exact(logit - logit.amax()), 1.0)
    weight = e / from_fixed(to_fixed(e).sum())
    return to_fixed(weight.clamp(min=lowest).clamp(max=highest))


def _level(counts: Tensor, missing: Tensor, tokens_per_frame: int) -> Tensor:
    """Adds `missing` tokens one by one to the smallest count, or takes them off the largest, first frame first.

    The result of that loop is a water level: every count below (above) it is brought to it, and what is left
    goes to the first frames that stand at it.
    """
    water = torch.arange(-1, tokens_per_frame + 2, device=counts.device)  # [P + 3]
    ordered = counts.sort().values
    sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))  # [T + 1] of the smallest counts
    below = torch.searchsorted(ordered, water)  # [P + 3] counts below each level
    added = water * below - sums[below]
    taken = sums[-1:] - sums[below] - water * (counts.numel() - below)
    up = (added <= missing).sum() - 2  # water[i] is i - 1; indexing with a tensor would read it on the host
    down = (taken > -missing).sum().clamp(max=tokens_per_frame + 2) - 1
    raised = torch.maximum(counts, up)
    lowered = torch.minimum(counts, down)
    up_rest = missing - (raised - counts).sum()
    down_rest = -missing - (counts - lowered).sum()
    raised = raised + ((raised == up) & ((raised == up).cumsum(0) <= up_rest)).long()
    lowered = lowered - ((lowered == down) & ((lowered == down).cumsum(0) <= down_rest)).long()
    return torch.where(missing > 0, raised, lowered)


def ranked_tokens(
    grid: tuple[int, int, int],
    num_keep: int,
    keep_ratio: float,
    importance_ratio: float,
    fill: bool,
) -> int:
    """How many of a video's kept tokens are chosen by score. The order of products is the published one."""
    t, h, w = grid
    if not fill or importance_ratio == 1.0:
        return num_keep
    return min(num_keep, math.floor(importance_ratio * keep_ratio * h * w * t))


def _video_budget(
    scores: Tensor | None,
    grid: tuple[int, int, int],
    ranked: int,
    keep_ratio: float,
    importance_ratio: float,
    max_frame_ratio: float,
    strict: bool,
    device: torch.device,
) -> Tensor:
    """Ranked tokens per frame of one video, [T] int64 with sum `ranked`."""
    t, h, w = grid
    scores = torch.zeros(t, device=device) if scores is None else scores
    weights = _frame_weights(scores, 1 / (2 * t), 1 / (t * keep_ratio) * max_frame_ratio)
    quota = float(round(importance_ratio * keep_ratio * h * w * t))
    cap = int(min(importance_ratio * h * w * max_frame_ratio, h * w))
    if strict:
        cap = min(max(cap, -(-ranked // t)), h * w)
    share = torch.round(weights.double() * quota / weights.sum().clamp(min=1).double()).long()
    counts = share.clamp(min=1).clamp(max=cap)
    return _level(counts, ranked - counts.sum(), h * w)


def _fill_ranks(count: int, unranked: int, strict: bool, device: torch.device) -> Tensor:
    """[count] uniformly spaced positions among `unranked` tokens, strictly increasing.

    The published code rounds a float32 linspace; `strict`, and rows where that could pick a token twice,
    round the exact fraction half to even.
    """
    j = torch.arange(count, device=device)
    if count <= 1:
        return j
    last, gaps = unranked - 1, count - 1
    if not strict and last < 2**24 and last > gaps * (1.0 + (last + 1.0) * 2.0**-21):
        end = torch.full((), float(last), dtype=torch.float32, device=device)
        step = end / float(gaps)
        # One rounding, like the fused multiply-add that torch's vectorised code has here; exact as float64.
        down = (end.double() - step.double() * (gaps - j).double()).float()
        x = torch.where(j < count // 2, step * j.float(), down)
        return torch.round(x).long()
    quotient, twice = j * last // gaps, 2 * (j * last % gaps)
    return quotient + ((twice > gaps) | ((twice == gaps) & (quotient % 2 == 1))).long()


def _split(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x.reshape(-1).split(lengths))


def video_ratios(
    grids: list[tuple[int, int, int]], num_keep: list[int], keep_ratio: float | None, max_frame_ratio: float | None
) -> list[tuple[float, float]]:
    """Keep ratio and frame cap of every video: where no ratio is given its share of kept tokens, and 1.5 times that."""
    shares = [
        kept / (t * h * w) if keep_ratio is None else keep_ratio
        for kept, (t, h, w) in zip(num_keep, grids, strict=True)
    ]
    return [(share, 1.5 * share if max_frame_ratio is None else max_frame_ratio) for share in shares]


def _grids(flat: list[int]) -> list[tuple[int, int, int]]:
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


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
    grids = _grids(grid_thw)
    ratios = video_ratios(grids, num_keep, keep_ratio, max_frame_ratio)
    counts = [frame_scores.new_empty(0, dtype=torch.int64)]  # of no videos, too, there is an answer
    status = [frame_scores.new_empty(0, dtype=torch.int32)]
    for v, scores in enumerate(_split(frame_scores, [t for t, _, _ in grids])):
        share, cap = ratios[v]
        ranked = ranked_tokens(grids[v], num_keep[v], share, importance_ratio, True)
        args = (share, importance_ratio, cap, strict, scores.device)
        counts.append(_video_budget(scores, grids[v], ranked, *args))
        status.append(status_of(scores[:, None]))
    return torch.cat(counts), torch.cat(status)


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
    grids = _grids(grid_thw)
    ratios = video_ratios(grids, num_keep, keep_ratio, max_frame_ratio)
    device = token_scores.device
    frames = None if frame_scores is None else _split(frame_scores, [t for t, _, _ in grids])
    none = torch.empty(0, dtype=torch.int64, device=device)
    indices, counts, status, start = [none], [none], [none.int()], 0
    for v, scores in enumerate(_split(token_scores, [t * h * w for t, h, w in grids])):
        t, h, w = grids[v]
        frame = None if frames is None else frames[v]
        share, cap = ratios[v]
        ranked = ranked_tokens(grids[v], num_keep[v], share, importance_ratio, fill)
        args = (share, importance_ratio, cap, strict, device)
        budget = _video_budget(frame, grids[v], ranked, *args)  # [T]
        order = ranking(scores.reshape(t, h * w))  # [T, P]
        taken = torch.arange(h * w, device=device) < budget[:, None]  # [T, P], in ranked order
        kept = torch.zeros_like(taken).scatter_(1, order, taken).reshape(-1)  # [N]
        unranked = masked_positions(~kept, t * h * w - ranked)
        picks = _fill_ranks(num_keep[v] - ranked, t * h * w - ranked, strict, device)
        kept = kept.scatter(0, unranked[picks], True)
        found = masked_positions(kept, num_keep[v])
        if by_score:
            found = found[ranking(scores[found])]
        indices.append(found + start)
        counts.append(kept.reshape(t, h * w).sum(1))
        status.append(status_of(scores.reshape(t, h * w)) | (0 if frame is None else status_of(frame[:, None])))
        start += t * h * w
    return torch.cat(indices), torch.cat(counts), torch.cat(status)


def kept_by(
    select_tokens: Callable,
    gather_rows: Callable,
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
    """`select_kept` of a backend whose selection and gather are launches of their own."""
    indices, frame_counts, frame_status = select_tokens(
        token_scores, frame_scores, grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill,
        False,
    )  # fmt: skip
    cu_seqlens = numbers_on(indices.device, [0, *accumulate(num_keep)], torch.int32)  # [B + 1]
    mask = kept_mask(indices, token_scores.numel())  # [N]
    positions = kept_positions(indices, num_keep, _grids(grid_thw))  # [3, K]
    rows = token_scores.new_empty(0) if tokens is None else gather_rows([tokens], indices, [0])[0]  # [K, D]
    return indices, frame_counts, frame_status, cu_seqlens, mask, positions, rows


def select_kept(*args):
    return kept_by(select_tokens, gather.gather_rows, *args)


def segmented_topk(scores: Tensor, cu_seqlens: list[int], k: list[int], by_score: bool) -> tuple[Tensor, Tensor]:
    """Flat positions of the k[s] best of every segment [sum of k] int64 and status [S] int32."""
    indices, status = [scores.new_empty(0, dtype=torch.int64)], [scores.new_empty(0, dtype=torch.int32)]
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    for s, segment in enumerate(_split(scores, lengths)):
        best = ranking(segment)[: k[s]]
        indices.append((best if by_score else best.sort().values) + cu_seqlens[s])
        status.append(status_of(segment[None]))
    return torch.cat(indices), torch.cat(status)


__all__ = ["allocate_budget", "order_key", "segmented_topk", "select_tokens"]
