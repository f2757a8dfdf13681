"""Online combination space sampling, and sampling without replacement."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import cacovid_kernels as ck

P, RATE, GROUP_SIZE, MAX_GROUP = 196, 0.02, 2.0, 2.0
DRAW = round(RATE * P)  # 4 tokens of a frame
GROUPS = int(1 / RATE / GROUP_SIZE)  # 25
CAP = max(min(MAX_GROUP / GROUPS, 0.9), 0.1)
SIZES = [P // GROUPS + (g < P % GROUPS) for g in range(GROUPS)]
STARTS = torch.tensor([0, *itertools.accumulate(SIZES)][:-1])
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
        group = torch.zeros(samples, P)
        for i, g in enumerate(drawn):
            group[i, members[g]] = 1
        weight = p * group
        weight = (weight / (weight.sum(-1, keepdim=True) + 1e-8)).clamp(0.5 / (P // GROUPS), 2 / (P // GROUPS)) * group
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-8)
        picked = torch.multinomial(weight, DRAW, replacement=False)
        masks.append(torch.zeros(samples, P).scatter_(1, picked, 1))
    combined = torch.stack(masks, 1)  # [S, T, P]
    combined[0] = torch.zeros_like(combined[0]).scatter_(1, scores.topk(DRAW).indices, 1)
    return combined


def fastest_torch(scores: Tensor, samples: int, whole_frames: bool = False) -> Tensor:
    """All frames and samples at once, and only the tokens of the group that was drawn."""
    t = scores.shape[0]
    value, order = scores.softmax(-1).sort(dim=-1, descending=True)
    slots = STARTS[:, None] + torch.arange(LONGEST)
    inside = torch.arange(LONGEST) < torch.tensor(SIZES)[:, None]
    slots = slots.clamp_(max=P - 1)
    padded = value[:, slots] * inside  # [T, G, longest]
    share = padded.sum(-1)
    cap, rest = CAP, torch.ones(t, 1)
    result, racing = torch.zeros_like(share), torch.ones_like(share)
    share = share.clamp_(min=1 / GROUPS**2)
    share = share / share.sum(-1, keepdim=True)
    for g in range(int(1 / CAP)):  # groups are sorted: the g-th cut is at group g
        over = share[:, g : g + 1] > cap
        if not over.any():
            break
        result[:, g : g + 1] = torch.where(over, cap * rest, result[:, g : g + 1])
        racing[:, g : g + 1] = torch.where(over, 0.0, racing[:, g : g + 1])
        rest = torch.where(over, rest * (1 - cap), rest)
        left = share.clamp(min=1 / GROUPS**2) * racing
        share = torch.where(over, left / left.sum(-1, keepdim=True), share)
        cap = cap / (1 - cap)
    share = result + share * racing * rest
    drawn = torch.multinomial(share, samples, replacement=True)  # [T, S]
    weight = padded / (padded.sum(-1, keepdim=True) + 1e-8)
    weight = weight.clamp_(0.5 / (P // GROUPS), 2 / (P // GROUPS)) * inside
    chosen = weight.gather(1, drawn[:, :, None].expand(-1, -1, LONGEST))  # [T, S, longest]
    at = STARTS[drawn][:, :, None]
    if whole_frames:
        ranks = (at + torch.arange(LONGEST)).clamp_(max=P - 1)
        chosen = torch.zeros(t, samples, P).scatter_add_(2, ranks, chosen)  # [T, S, P]
    place = (chosen / torch.empty_like(chosen).exponential_()).topk(DRAW, dim=-1, sorted=False).indices
    ranks = place if whole_frames else at + place
    picked = order.gather(1, ranks.clamp_(max=P - 1).view(t, -1)).view(t, samples, DRAW)
    picked[:, 0] = order[:, :DRAW]
    picked = picked.sort(-1).values + (torch.arange(t) * P)[:, None, None]
    return picked.transpose(0, 1).reshape(samples, -1)


seeds = itertools.count()


def ours(scores: Tensor, samples: int) -> Tensor:
    return ck.sample_combinations(
        scores, num_samples=samples, keep_ratio=RATE, group_size=GROUP_SIZE, max_group_prob=MAX_GROUP, seed=next(seeds)
    ).indices


COMBINATIONS = {
    "ours": ours,
    "fastest torch": fastest_torch,
    "torch over whole frames": lambda scores, samples: fastest_torch(scores, samples, whole_frames=True),
    "published formula": published_formula,
}


@pytest.mark.parametrize(("frames", "samples"), [(32, 23), (128, 23)])
@pytest.mark.parametrize("contestant", COMBINATIONS)
def bench_combinations(race, frames, samples, contestant):
    generator = torch.Generator().manual_seed(frames)
    inputs = [(torch.randn(frames, P, generator=generator), samples) for _ in range(200)]
    best = inputs[0][0].topk(DRAW, dim=-1).indices.sort(-1).values + torch.arange(frames)[:, None] * P
    if contestant != "published formula":
        found = COMBINATIONS[contestant](*inputs[0])
        assert found.shape == (samples, frames * DRAW)
        assert torch.equal(found[0], best.reshape(-1))
        assert (found[1:].view(samples - 1, frames, DRAW).diff(dim=-1) > 0).all()
    name = f"combinations {samples} x {frames} x {P}, draw {DRAW}"
    race(name, contestant, COMBINATIONS[contestant], inputs, {"fastest torch": 20})


def gumbel_torch(logits: Tensor, k: int, samples: int) -> Tensor:
    """Gumbel top-k in plain torch: noise by exponential_, no log-probability."""
    return (logits - torch.empty(samples, *logits.shape).exponential_().log_()).topk(k, dim=-1).indices


GUMBEL = {
    "ours": lambda x, k, samples: ck.gumbel_topk(x, k, num_samples=samples, seed=next(seeds)).indices,
    "exponential_ and topk": gumbel_torch,
    "multinomial": lambda x, k, samples: torch.multinomial(x.softmax(-1).repeat(samples, 1), k),
}


@pytest.mark.parametrize("contestant", GUMBEL)
def bench_gumbel_topk(race, contestant):
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(32, P, generator=generator), 20, 8) for _ in range(100)]
    race(f"gumbel top-k 8 x 32 x {P}, k=20", contestant, GUMBEL[contestant], inputs)
