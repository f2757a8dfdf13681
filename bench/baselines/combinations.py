"""Online combination space sampling of one video, and sampling without replacement."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

P, RATE, GROUP_SIZE, MAX_GROUP = 196, 0.02, 2.0, 2.0
DRAW = round(RATE * P)  # 4 tokens of a frame
GROUPS = int(1 / RATE / GROUP_SIZE)  # 25
CAP = max(min(MAX_GROUP / GROUPS, 0.9), 0.1)
SIZES = [P // GROUPS + (g < P % GROUPS) for g in range(GROUPS)]
STARTS = [0, *itertools.accumulate(SIZES)][:-1]
LONGEST = max(SIZES)


def capped(p: Tensor) -> Tensor:
    """The published recursion on one distribution: cut the largest to the cap, normalise the rest again."""

    def cut(p: Tensor, cap: float, racing: Tensor) -> Tensor:
        p = p.clamp(min=1 / p.shape[0] ** 2) * racing
        p = p / p.sum()
        largest, at = p.max(), p.argmax()
        if largest <= min(cap, 0.999) or racing.sum() == 1:
            return p
        racing = racing.clone()
        racing[at] = 0
        rest = 1 - cap
        p = cut(p, cap / rest, racing) * rest
        p[at] = cap
        return p

    return cut(p, CAP, torch.ones_like(p))


def published_formula(scores: Tensor, samples: int) -> Tensor:
    """The published steps in plain torch: frame by frame, a mask for every sample."""
    masks = []
    for p in scores.softmax(-1):
        value, order = p.sort(descending=True)
        share = capped(torch.stack([chunk.sum() for chunk in value.split(SIZES)]))
        drawn = torch.multinomial(share / share.sum(), samples, replacement=True)
        members = order.split(SIZES)
        group = p.new_zeros(samples, P)
        for i, g in enumerate(drawn):
            group[i, members[g]] = 1
        weight = p * group
        weight = (weight / (weight.sum(-1, keepdim=True) + 1e-8)).clamp(0.5 / (P // GROUPS), 2 / (P // GROUPS)) * group
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-8)
        picked = torch.multinomial(weight, DRAW, replacement=False)
        masks.append(p.new_zeros(samples, P).scatter_(1, picked, 1))
    combined = torch.stack(masks, 1)  # [S, T, P]
    combined[0] = torch.zeros_like(combined[0]).scatter_(1, scores.topk(DRAW).indices, 1)
    return combined


@lru_cache(maxsize=2)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rank at which every group starts, the ranks of its slots, and which of the slots it has."""
    starts, sizes, slot = torch.tensor(STARTS), torch.tensor(SIZES), torch.arange(LONGEST)
    slots = (starts[:, None] + slot).clamp_(max=P - 1)
    return starts.to(device), slots.to(device), (slot < sizes[:, None]).to(device)


def fastest_torch(scores: Tensor, samples: int, whole_frames: bool = False) -> Tensor:
    """All frames and samples at once, and only the tokens of the group that was drawn."""
    return _draw(scores, samples, *_tables(scores.device), whole_frames, host_reads=True)


def vectorised_torch(scores: Tensor, samples: int) -> Tensor:
    """The same without a host read, as a GPU wants it."""
    return _draw(scores, samples, *_tables(scores.device), whole_frames=False, host_reads=False)


def compiled_torch(device: torch.device, compile: Callable[[Callable], Callable]) -> Callable:
    """`vectorised_torch` through `compile`, with the tables as arguments: made inside, they would be constants."""
    call = compile(_draw)
    return lambda scores, samples: call(scores, samples, *_tables(device), False, False)


def _draw(
    scores: Tensor, samples: int, starts: Tensor, slots: Tensor, inside: Tensor, whole_frames: bool, host_reads: bool
) -> Tensor:
    t = scores.shape[0]
    value, order = scores.softmax(-1).sort(dim=-1, descending=True)
    padded = value[:, slots] * inside  # [T, G, longest]
    share = padded.sum(-1)
    cap, rest = CAP, torch.ones_like(share[:, :1])
    result, racing = torch.zeros_like(share), torch.ones_like(share)
    share = share.clamp_(min=1 / GROUPS**2)
    share = share / share.sum(-1, keepdim=True)
    for g in range(int(1 / CAP)):  # groups are sorted: the g-th cut is at group g
        over = share[:, g : g + 1] > cap
        if host_reads and not over.any():
            break
        result[:, g : g + 1] = torch.where(over, cap * rest, result[:, g : g + 1])
        racing[:, g : g + 1] = torch.where(over, 0.0, racing[:, g : g + 1])
        rest = torch.where(over, rest * (1 - cap), rest)
        left = share.clamp(min=1 / GROUPS**2) * racing
        share = torch.where(over, left / left.sum(-1, keepdim=True), share)
        cap = min(cap / (1 - cap), 0.999)
    share = result + share * racing * rest
    drawn = torch.multinomial(share, samples, replacement=True)  # [T, S]
    weight = padded / (padded.sum(-1, keepdim=True) + 1e-8)
    weight = weight.clamp_(0.5 / (P // GROUPS), 2 / (P // GROUPS)) * inside
    chosen = weight.gather(1, drawn[:, :, None].expand(-1, -1, LONGEST))  # [T, S, longest]
    at = starts[drawn][:, :, None]
    if whole_frames:
        ranks = (at + torch.arange(LONGEST, device=scores.device)).clamp_(max=P - 1)
        chosen = scores.new_zeros(t, samples, P).scatter_add_(2, ranks, chosen)  # [T, S, P]
    place = (chosen / torch.empty_like(chosen).exponential_()).topk(DRAW, dim=-1, sorted=False).indices
    ranks = place if whole_frames else at + place
    picked = order.gather(1, ranks.clamp_(max=P - 1).view(t, -1)).view(t, samples, DRAW)
    picked[:, 0] = order[:, :DRAW]
    picked = picked.sort(-1).values + (torch.arange(t, device=scores.device) * P)[:, None, None]
    return picked.transpose(0, 1).reshape(samples, -1)


def gumbel_torch(logits: Tensor, k: int, samples: int) -> Tensor:
    """Gumbel top-k in plain torch: noise by exponential_, no log-probability."""
    return (logits - logits.new_empty(samples, *logits.shape).exponential_().log_()).topk(k, dim=-1).indices
