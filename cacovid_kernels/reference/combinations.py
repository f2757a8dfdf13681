"""Online combination space sampling: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cacovid_kernels.reference.exact import exp_exact, from_fixed, ranking, to_fixed
from cacovid_kernels.reference.random import (
    STREAM_FRAMES,
    STREAM_GROUPS,
    STREAM_TOKENS,
    gumbel_noise,
    ln_float,
    random_bits,
)
from cacovid_kernels.reference.sample import SHORT, draw, pl_log_prob, row_status


def _ranked_exp(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[T, P]` -> order by rank, exp(score - best) in that order, number of tokens with a chance `[T]`.

    -inf and NaN have none; where a score is +inf, e is 1 for those and 0 for all others.
    """
    order = ranking(scores)
    x = scores.double().gather(-1, order)
    valid = (x > -math.inf).sum(-1)
    best = x[:, :1]
    below = torch.where(best == math.inf, torch.where(x == math.inf, 0.0, -math.inf), x - best)
    e = torch.where(x > -math.inf, exp_exact(below), 0.0)
    return order, e, valid


def group_starts(tokens: int, groups: int, device: torch.device | None = None) -> Tensor:
    """`[groups + 1]` ranks at which the groups start; the first `tokens % groups` hold one token more."""
    g = torch.arange(groups + 1, device=device)
    return g * (tokens // groups) + g.clamp(max=tokens % groups)


def cap_shares(share: Tensor, count: Tensor, cap: float) -> Tensor:
    """Shares `[T, G]` that never rise, of which the first `count[t]` matter -> probabilities, 0 for the others.

    None exceeds the cap or falls below 1/count^2 of what is left for it: the largest is cut to the cap, the others
    are normalised again, and so on.
    """
    groups = share.shape[1]
    g = torch.arange(groups, device=share.device)
    feasible = 1.0 / count.double()[:, None]  # [T, 1]
    floor, cap = feasible * feasible, feasible.clamp(min=cap)
    result = torch.zeros_like(share)
    rest = norm = torch.ones_like(feasible)  # shares from `first` on are share / norm of rest
    busy = torch.ones_like(feasible, dtype=torch.bool)
    for first in range(groups):
        racing = (g >= first) & (g < count[:, None])
        share = torch.where(racing, torch.maximum(share, floor * norm), 0.0)
        norm = from_fixed(to_fixed(share).sum(1, keepdim=True))
        cap = cap.clamp(max=0.999)
        largest = share[:, first : first + 1]
        done = busy & ((first == count[:, None] - 1) | (largest <= cap * norm))
        result = torch.where(done & racing, share * (rest / norm), result)
        busy = busy & ~done
        result[:, first : first + 1] = torch.where(busy, cap * rest, result[:, first : first + 1])
        rest = torch.where(busy, rest * (1.0 - cap), rest)
        cap = torch.where(busy, cap / (1.0 - cap), cap)
    return result


def combination_space(
    scores: Tensor, num_draw: int, num_groups: int, group_cap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distribution that one frame's combinations are drawn from.

    Args:
        scores: `[T, P]`.

    Returns:
        order `[T, P]` by rank, group of every rank `[P]`, probability of every group `[T, G]` float64, weight of
        every token inside its group `[T, P]` float64, in ranked order; 0 where it has no chance.
    """
    tokens = scores.shape[1]
    order, e, valid = _ranked_exp(scores)
    starts = group_starts(tokens, num_groups, scores.device)  # [G + 1]
    rank = torch.arange(tokens, device=scores.device)
    group = torch.searchsorted(starts, rank, right=True) - 1  # [P]
    fixed = to_fixed(e)
    total = from_fixed(fixed.sum(1, keepdim=True).clamp(min=1))  # [T, 1]
    share = from_fixed(torch.zeros(len(e), num_groups, dtype=torch.int64, device=e.device).index_add(1, group, fixed))
    share = share / total  # [T, G]
    whole = starts[:-1] + num_draw <= valid[:, None]  # [T, G]: the group holds num_draw tokens with a chance
    probability = cap_shares(share, whole.sum(1).clamp(min=1), group_cap)
    scaled = e * (1.0 / (total * (share + 1e-8)))[:, group]
    uniform = 1.0 / float(tokens // num_groups)
    weight = scaled.clamp(min=0.5 * uniform, max=2.0 * uniform)
    return order, group, probability, torch.where(rank < valid[:, None], weight, 0.0)


def _log_weight(weight: Tensor) -> Tensor:
    """float32 ln of float64 weights; -inf for 0."""
    return torch.where(weight > 0, ln_float(weight.float().clamp(min=1e-30)), -math.inf)


def _token_combinations(
    scores: Tensor, video: int, num_samples: int, num_draw: int, num_groups: int, group_cap: float, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One video `[T, P]` -> token in its frame `[S, T, k]` ascending, group `[S, T]`, log_prob `[S, T]`, status."""
    frames, tokens = scores.shape
    device = scores.device
    order, group, probability, weight = combination_space(scores, num_draw, num_groups, group_cap)
    valid = (weight > 0).sum(1)
    frame = torch.arange(frames, device=device)
    cumulative = torch.round(probability * 2.0**30).long().cumsum(1)  # [T, G]
    column = frame[:, None] * tokens + order  # [T, P]: who each token is to the generator
    row = torch.full_like(frame, video)
    rank = torch.arange(tokens, device=device)
    top = torch.where(rank < valid[:, None], order, tokens)[:, :num_draw]
    indices = [top.sort(1).values]
    groups = [torch.full_like(frame, -1)]
    log_prob = [torch.zeros(frames, device=device)]
    for s in range(1, num_samples):
        sample = torch.full_like(frame, s)
        bits = random_bits(frame, row, sample, seed, step, STREAM_GROUPS)  # [T]
        threshold = (bits * cumulative[:, -1]) >> 32
        drawn = (cumulative <= threshold[:, None]).sum(1)  # [T]
        member = torch.where(group == drawn[:, None], weight, 0.0)  # [T, P]
        noise = gumbel_noise(random_bits(column, row[:, None], sample[:, None], seed, step, STREAM_TOKENS))
        ranks = draw(_log_weight(member), noise, num_draw)  # [T, k] in draw order
        found = torch.where(ranks < 0, tokens, order.gather(1, ranks.clamp(min=0)))
        indices.append(found.sort(1).values)
        groups.append(drawn)
        inside = pl_log_prob(member.log(), ranks[None])[0]
        log_prob.append((probability.gather(1, drawn[:, None])[:, 0].log() + inside).float())
    picked = torch.stack(indices)[:num_samples]
    status = row_status(scores) | torch.where(valid < num_draw, SHORT, 0).int()
    combined = status[0]
    for bits in status[1:]:
        combined = combined | bits
    return (
        torch.where(picked == tokens, -1, picked),
        torch.stack(groups)[:num_samples],
        torch.stack(log_prob)[:num_samples],
        combined,
    )


def frame_weights(scores: Tensor, num_samples: int, strict: bool) -> tuple[Tensor, Tensor]:
    """Frame scores `[T]` -> order by rank and weights `[T]` float64 in ranked order, 0 where there is no chance."""
    order, e, valid = _ranked_exp(scores[None])
    total = from_fixed(to_fixed(e).sum(1, keepdim=True).clamp(min=1))
    share = e / total
    if strict:
        weight = cap_shares(share, valid.clamp(min=1), 3.0 / scores.numel())
    else:
        weight = share.clamp(min=1.0 / (num_samples * num_samples))
    rank = torch.arange(scores.numel(), device=scores.device)
    return order[0], torch.where(rank < valid[:, None], weight, 0.0)[0]


def _frame_combinations(
    scores: Tensor, video: int, num_samples: int, num_frames: int, strict: bool, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Frame scores `[T]` -> frames `[S, KF]` ascending, log_prob `[S]`, status."""
    frames = scores.numel()
    order, weight = frame_weights(scores, num_samples, strict)
    valid = (weight > 0).sum()
    rank = torch.arange(frames, device=scores.device)
    row = torch.full_like(rank, video)
    drawn = [torch.where(rank < valid, rank, -1)[:num_frames]]
    for s in range(1, num_samples):
        bits = random_bits(order, row, torch.full_like(rank, s), seed, step, STREAM_FRAMES)
        drawn.append(draw(_log_weight(weight), gumbel_noise(bits), num_frames))
    ranks = torch.stack(drawn)  # [S, KF]
    picked = torch.where(ranks < 0, frames, order[ranks.clamp(min=0)]).sort(1).values
    log_prob = pl_log_prob(weight.log()[None], ranks[:, None])[:, 0].float()
    log_prob[0] = 0.0
    status = row_status(scores) | torch.where(valid < num_frames, SHORT, 0).int()
    return torch.where(picked == frames, -1, picked), log_prob, status


def sample_combinations(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: list[int],
    num_samples: int,
    num_draw: list[int],
    num_groups: list[int],
    group_cap: list[float],
    num_frame_samples: int,
    num_frames: list[int],
    strict: bool,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices `[S, K]`, groups `[S, F]`, log_prob `[S, F]`, frame_indices `[SF, KF]`, frame_log_prob `[SF, B]`,
    status `[B]`. Sample 0 holds the best tokens and the best frames."""
    indices, groups, log_prob, status = [], [], [], []
    frame_indices, frame_log_prob = [], []
    tokens = frames = 0
    for v in range(len(num_draw)):
        t, p = grid_thw[3 * v], grid_thw[3 * v + 1] * grid_thw[3 * v + 2]
        scores = token_scores.reshape(-1)[tokens : tokens + t * p].reshape(t, p)
        picked, group, probability, flags = _token_combinations(
            scores, v, num_samples, num_draw[v], num_groups[v], group_cap[v], seed, step
        )
        start = tokens + torch.arange(t, device=scores.device)[:, None] * p
        indices.append(torch.where(picked < 0, -1, picked + start).reshape(num_samples, -1))
        groups.append(group)
        log_prob.append(probability)
        if num_frame_samples > 0 and frame_scores is not None:
            per_frame = frame_scores.reshape(-1)[frames : frames + t]
            chosen, probability, frame_flags = _frame_combinations(
                per_frame, v, num_frame_samples, num_frames[v], strict, seed, step
            )
            frame_indices.append(torch.where(chosen < 0, -1, chosen + frames))
            frame_log_prob.append(probability[:, None])
            flags = flags | frame_flags
        status.append(flags.reshape(1))
        tokens += t * p
        frames += t
    empty = token_scores.new_empty(num_frame_samples, 0)
    return (
        torch.cat(indices, 1),
        torch.cat(groups, 1),
        torch.cat(log_prob, 1),
        torch.cat(frame_indices, 1) if frame_indices else empty.long(),
        torch.cat(frame_log_prob, 1) if frame_log_prob else empty.float(),
        torch.cat(status),
    )
