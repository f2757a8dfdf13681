"""Online combination space sampling: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cacovid_kernels.reference.exact import from_fixed, ranking, to_fixed
from cacovid_kernels.reference.random import (
    STREAM_FRAMES,
    STREAM_GROUPS,
    STREAM_TOKENS,
    exp_float,
    gumbel_noise,
    ln_float,
    random_bits,
    step_of,
)
from cacovid_kernels.reference.sample import SHORT, draw, pl_log_prob, row_status


def _exps(scores: Tensor) -> Tensor:
    """exp(score - best) of scores `[T, P]`, float32; 0 for -inf and NaN.

    Where a score is +inf, 1 for those and 0 for all others.
    """
    x = torch.where(scores > -math.inf, scores.float(), -math.inf)
    best = x.amax(-1, keepdim=True)
    return torch.where(best == math.inf, (x == math.inf).float(), exp_float(x - best))


def group_starts(tokens: int, groups: int, device: torch.device | None = None) -> Tensor:
    """`[groups + 1]` ranks at which the groups start; the first `tokens % groups` hold one token more."""
    g = torch.arange(groups + 1, device=device)
    return g * (tokens // groups) + g.clamp(max=tokens % groups)


def group_cap(num_groups: int, max_group_prob: float) -> float:
    """The most probability that a group may have."""
    return max(min(max_group_prob / num_groups, 0.9), 0.1) if num_groups > 1 else 1.0


def cap_shares(share: Tensor, count: Tensor, cap: float) -> Tensor:
    """Shares `[T, G]` that never rise, of which the first `count[t]` matter -> probabilities, 0 for the others.

    None exceeds the cap or falls below 1/count^2 of what is left for it: the largest is cut to the cap, the others
    are normalised again, and so on.
    """
    groups = share.shape[1]
    g = torch.arange(groups, device=share.device)
    feasible = 1.0 / count.double()[:, None]  # [T, 1]
    floor, limit = feasible * feasible, feasible.clamp(min=cap)
    result = torch.zeros_like(share)
    rest = norm = torch.ones_like(feasible)  # shares from `first` on are share / norm of rest
    busy = torch.ones_like(feasible, dtype=torch.bool)
    for first in range(groups):
        racing = (g >= first) & (g < count[:, None])
        share = torch.where(racing, torch.maximum(share, floor * norm), 0.0)
        norm = from_fixed(to_fixed(share).sum(1, keepdim=True))
        limit = limit.clamp(max=0.999)
        largest = share[:, first : first + 1]
        done = busy & ((first == count[:, None] - 1) | (largest <= limit * norm))
        result = torch.where(done & racing, share * (rest / norm), result)
        busy = busy & ~done
        result[:, first : first + 1] = torch.where(busy, limit * rest, result[:, first : first + 1])
        rest = torch.where(busy, rest * (1.0 - limit), rest)
        limit = torch.where(busy, limit / (1.0 - limit), limit)
    return result


def combination_space(scores: Tensor, num_draw: int, num_groups: int, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The distribution that a frame's combinations are drawn from.

    Args:
        scores: `[T, P]`.

    Returns:
        Group of every token `[T, P]`, probability of every group `[T, G]` float64, weight of every token inside its
        group `[T, P]` float32, 0 for -inf and NaN.
    """
    frames, tokens = scores.shape
    starts = group_starts(tokens, num_groups, scores.device)  # [G + 1]
    rank = torch.arange(tokens, device=scores.device)
    of_rank = (torch.searchsorted(starts, rank, right=True) - 1).expand(frames, -1)
    group = torch.zeros_like(of_rank).scatter(1, ranking(scores), of_rank)  # [T, P]
    e = _exps(scores)
    fixed = to_fixed(e.double())
    total = from_fixed(fixed.sum(1, keepdim=True).clamp(min=1))  # [T, 1]
    inside = torch.zeros(frames, num_groups, dtype=torch.int64, device=e.device).scatter_add(1, group, fixed)
    share = from_fixed(inside) * (1.0 / total)  # [T, G]
    chance = scores > -math.inf
    whole = starts[:-1] + num_draw <= chance.sum(1, keepdim=True)  # [T, G]: num_draw of its tokens have a chance
    probability = cap_shares(share, whole.sum(1).clamp(min=1), cap)
    scaled = e * (1.0 / (total * (share + 1e-8))).float().gather(1, group)
    uniform = e.new_full((), 1.0 / (tokens // num_groups))  # a fill: copies from the host wait for a device
    weight = torch.minimum(torch.maximum(scaled, 0.5 * uniform), 2.0 * uniform)
    return group, probability, torch.where(chance, weight, 0.0)


def _log_weight(weight: Tensor) -> Tensor:
    """ln of float32 weights; -inf for 0."""
    return torch.where(weight > 0, ln_float(torch.where(weight > 0, weight, 1.0)), -math.inf)


def _token_combinations(
    scores: Tensor,
    video: int,
    num_samples: int,
    num_draw: int,
    num_groups: int,
    cap: float,
    seed: int,
    step: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One video `[T, P]` -> token in its frame `[S, T, k]` ascending, group, log_prob `[S, T]`, status `[T]`."""
    frames, tokens = scores.shape
    device = scores.device
    group, probability, weight = combination_space(scores, num_draw, num_groups, cap)
    frame, token = torch.arange(frames, device=device), torch.arange(tokens, device=device)
    row = torch.full_like(frame, video)
    column = frame[:, None] * tokens + token  # [T, P]: who each token is to the generator
    cumulative = torch.round(probability * 2.0**30).long().cumsum(1)  # [T, G]
    best = ranking(scores)[:, :num_draw]
    best = torch.where(scores.gather(1, best) > -math.inf, best, tokens)
    indices = [best.sort(1).values]
    groups = [torch.full_like(frame, -1)]
    log_prob = [torch.zeros(frames, device=device)]
    for s in range(1, num_samples):
        sample = torch.full_like(frame, s)
        bits = random_bits(frame, row, sample, seed, step, STREAM_GROUPS)  # [T]
        threshold = (bits * cumulative[:, -1]) >> 32
        drawn = (cumulative <= threshold[:, None]).sum(1)  # [T]
        member = torch.where(group == drawn[:, None], weight, 0.0)  # [T, P]
        noise = gumbel_noise(random_bits(column, row[:, None], sample[:, None], seed, step, STREAM_TOKENS))
        found = draw(_log_weight(member), noise, num_draw)  # [T, k] in draw order
        indices.append(torch.where(found < 0, tokens, found).sort(1).values)
        groups.append(drawn)
        inside = pl_log_prob(member.double().log(), found[None])[0]
        log_prob.append((probability.gather(1, drawn[:, None])[:, 0].log() + inside).float())
    picked = torch.stack(indices)[:num_samples]
    status = row_status(scores) | torch.where((weight > 0).sum(1) < num_draw, SHORT, 0).int()
    return (
        torch.where(picked == tokens, -1, picked),
        torch.stack(groups)[:num_samples],
        torch.stack(log_prob)[:num_samples],
        status,
    )


def frame_weights(scores: Tensor, num_samples: int, strict: bool) -> Tensor:
    """Frame scores `[T]` -> weights `[T]` float32 that frames are drawn by, 0 for -inf and NaN."""
    e = _exps(scores[None]).double()
    share = e * (1.0 / from_fixed(to_fixed(e).sum(1, keepdim=True).clamp(min=1)))  # [1, T]
    chance = scores > -math.inf
    if strict:
        order = ranking(scores)[None]
        capped = cap_shares(share.gather(1, order), chance.sum()[None].clamp(min=1), 3.0 / scores.numel())
        weight = torch.zeros_like(share).scatter(1, order, capped)
    else:
        weight = share.clamp(min=1.0 / (num_samples * num_samples))
    return torch.where(chance, weight[0].float(), 0.0)


def _frame_combinations(
    scores: Tensor, video: int, num_samples: int, num_frames: int, strict: bool, seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Frame scores `[T]` -> frames `[S, KF]` ascending, log_prob `[S]`, status."""
    frames = scores.numel()
    weight = frame_weights(scores, num_samples, strict)
    frame = torch.arange(frames, device=scores.device)
    row = torch.full_like(frame, video)
    best = ranking(scores)[:num_frames]
    drawn = [torch.where(scores[best] > -math.inf, best, -1)]
    for s in range(1, num_samples):
        bits = random_bits(frame, row, torch.full_like(frame, s), seed, step, STREAM_FRAMES)
        drawn.append(draw(_log_weight(weight), gumbel_noise(bits), num_frames))
    found = torch.stack(drawn)  # [S, KF] in draw order
    log_prob = pl_log_prob(weight.double().log()[None], found[:, None])[:, 0].float()
    log_prob[0] = 0.0
    picked = torch.where(found < 0, frames, found).sort(1).values
    status = row_status(scores) | torch.where((weight > 0).sum() < num_frames, SHORT, 0).int()
    return torch.where(picked == frames, -1, picked), log_prob, status


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
    """Indices `[S, K]`, groups `[S, F]`, log_prob `[S, F]`, frame_indices `[SF, KF]`, frame_log_prob `[SF, B]`,
    status of the frames `[F]` and of their draws `[B]`. Sample 0 holds the best tokens and the best frames."""
    indices, groups = ([token_scores.new_empty(num_samples, 0, dtype=torch.int64)] for _ in range(2))
    log_prob = [token_scores.new_empty(num_samples, 0, dtype=torch.float32)]
    frame_indices = [token_scores.new_empty(num_frame_samples, 0, dtype=torch.int64)]
    frame_log_prob = [token_scores.new_empty(num_frame_samples, 0, dtype=torch.float32)]
    status, frame_draw_status = ([token_scores.new_empty(0, dtype=torch.int32)] for _ in range(2))
    now = step_of(step, added_steps)
    tokens = frames = 0
    for v in range(len(num_draw)):
        t, p = grid_thw[3 * v], grid_thw[3 * v + 1] * grid_thw[3 * v + 2]
        scores = token_scores.reshape(-1)[tokens : tokens + t * p].reshape(t, p)
        cap = group_cap(num_groups[v], max_group_prob)
        picked, group, probability, flags = _token_combinations(
            scores, v, num_samples, num_draw[v], num_groups[v], cap, seed, now
        )
        start = tokens + torch.arange(t, device=scores.device)[:, None] * p
        indices.append(torch.where(picked < 0, -1, picked + start).reshape(num_samples, -1))
        groups.append(group)
        log_prob.append(probability)
        if num_frame_samples > 0 and frame_scores is not None:
            per_frame = frame_scores.reshape(-1)[frames : frames + t]
            chosen, probability, frame_flags = _frame_combinations(
                per_frame, v, num_frame_samples, num_frames[v], strict, seed, now
            )
            frame_indices.append(torch.where(chosen < 0, -1, chosen + frames))
            frame_log_prob.append(probability[:, None])
            frame_draw_status.append(frame_flags.reshape(1))
        status.append(flags)
        tokens += t * p
        frames += t
    if num_frame_samples == 0:
        frame_indices = [token_scores.new_empty(0, sum(num_frames), dtype=torch.int64)]
        frame_log_prob = [token_scores.new_empty(0, len(num_draw), dtype=torch.float32)]
    return (
        torch.cat(indices, 1),
        torch.cat(groups, 1),
        torch.cat(log_prob, 1),
        torch.cat(frame_indices, 1),
        torch.cat(frame_log_prob, 1),
        torch.cat(status),
        torch.cat(frame_draw_status),
    )
