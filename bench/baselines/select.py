"""Selection of one video: budget, best tokens of every frame, uniform fill."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEEP, IMPORTANCE, CAP = 0.1, 0.5, 0.15
P = 196


def published_formula(token: Tensor, frame: Tensor) -> Tensor:
    """The steps of the published evaluation in plain torch, without the embeddings that it copies for a count."""
    t = frame.numel()
    f = (frame / frame.abs().max() * 3).softmax(-1).clip(min=1 / (2 * t), max=1 / (t * KEEP) * CAP)
    f = f / f.sum()
    counts = (f * round(IMPORTANCE * KEEP * P * t)).round().clip(min=1, max=int(IMPORTANCE * P * CAP)).long()
    missing = math.floor(IMPORTANCE * KEEP * P * t) - counts.sum()
    while missing < 0:
        counts[counts.argmax()] -= 1
        missing += 1
    while missing > 0:
        counts[counts.argmin()] += 1
        missing -= 1
    scores = (token * 0.001).softmax(-1)
    taken = torch.arange(P, device=token.device).repeat(t, 1) < counts[:, None]
    order = scores.sort(dim=-1, descending=True).indices + torch.arange(t, device=token.device)[:, None] * P
    mask = torch.zeros(t * P, dtype=torch.long, device=token.device)
    mask[order.reshape(-1)[taken.reshape(-1)]] = 1
    rest = math.floor(KEEP * t * P) - mask.sum()
    left = torch.zeros(int((mask == 0).sum()), dtype=torch.long, device=token.device)
    left.scatter_(0, torch.linspace(0, left.numel() - 1, int(rest), device=token.device).round().long(), 1)
    mask = mask.masked_scatter(mask == 0, left)
    return mask.nonzero().squeeze(1)


def vectorised_torch(token: Tensor, frame: Tensor) -> Tensor:
    """The same selection without a loop, a host read or a data-dependent shape, as a GPU or a compiler wants it."""
    t = frame.numel()
    n, ranked, keep = t * P, math.floor(IMPORTANCE * KEEP * P * t), math.floor(KEEP * t * P)
    f = (frame / frame.abs().max() * 3).softmax(-1).clamp(1 / (2 * t), 1 / (t * KEEP) * CAP)
    cap = int(IMPORTANCE * P * CAP)
    counts = (f * (round(IMPORTANCE * KEEP * P * t) / f.sum())).round().clamp(1, cap).long()
    missing = ranked - counts.sum()
    gaps = torch.arange(cap + 2, device=token.device)[:, None] - counts
    added, taken = gaps.clamp(min=0).sum(1), (-gaps).clamp(min=0).sum(1)
    up, down = (added <= missing).sum() - 1, (taken > -missing).sum()
    level = torch.where(missing > 0, torch.maximum(counts, up), torch.minimum(counts, down))
    rest = ranked - level.sum()
    edge = level == torch.where(missing > 0, up, down)
    counts = level + torch.where(edge & (edge.cumsum(0) <= rest.abs()), rest.sign(), 0)
    best = token.topk(cap + 1, dim=-1).indices  # [T, cap + 1]: no frame holds more
    within = torch.arange(cap + 1, device=token.device) < counts[:, None]
    mask = torch.zeros(t, P, dtype=torch.bool, device=token.device).scatter_(1, best, within).reshape(-1)
    unranked = (~mask).cumsum(0)
    picks = torch.linspace(0, n - ranked - 1, keep - ranked, device=token.device).round().long() + 1
    mask = mask.scatter(0, torch.searchsorted(unranked, picks), True)
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, keep + 1, device=token.device))


def fastest_torch(token: Tensor, frame: Tensor) -> Tensor:
    """The fastest that plain torch gave us on a CPU, where reading a value on the host costs nothing."""
    t = frame.numel()
    n, ranked, keep = t * P, math.floor(IMPORTANCE * KEEP * P * t), math.floor(KEEP * t * P)
    f = (frame * (3 / frame.abs().amax())).softmax(-1).clamp_(1 / (2 * t), 1 / (t * KEEP) * CAP)
    f.mul_(round(IMPORTANCE * KEEP * P * t) / f.sum())
    counts = f.round_().clamp_(1, int(IMPORTANCE * P * CAP)).long()
    missing = ranked - int(counts.sum())
    if missing:
        sign = 1 if missing > 0 else -1
        ordered = (counts * sign).sort().values  # the level rises in these, whichever way it goes
        volume = ordered * torch.arange(1, t + 1) - ordered.cumsum(0)
        low = int((volume <= abs(missing)).sum())  # so many frames come to the level
        level = (abs(missing) + int(ordered[:low].sum())) // low
        below = counts * sign <= level
        rest = abs(missing) - int((level - counts[below] * sign).sum())
        counts[below] = level * sign
        counts[(counts == level * sign).nonzero().squeeze(1)[:rest]] += sign
    most = int(counts.max())
    best = token.topk(most, dim=-1).indices
    mask = torch.zeros(t, P, dtype=torch.bool).scatter_(1, best, torch.arange(most) < counts[:, None]).view(-1)
    free = (~mask).nonzero().squeeze(1)
    mask[free[torch.linspace(0, n - ranked - 1, keep - ranked).round_().long()]] = True
    return mask.nonzero().squeeze(1)
