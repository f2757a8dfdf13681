"""Online combination space sampling, and sampling without replacement."""

from __future__ import annotations

import itertools

import pytest
import torch
from baselines.combinations import DRAW, GROUP_SIZE, MAX_GROUP, RATE, P, fastest_torch, gumbel_torch, published_formula
from torch import Tensor

import cacovid_kernels as ck

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
