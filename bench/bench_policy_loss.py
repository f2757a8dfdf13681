"""Policy loss and gradient of one video: 32 frames of 196 tokens, 115 combinations as a replay memory holds them."""

from __future__ import annotations

import pytest
import torch
from baselines.policy_loss import fewest_passes, published_formula
from torch import Tensor

import cacovid_kernels as ck

N, G = 32 * 196, 115


def ours(logits: Tensor, old: Tensor, masks: Tensor, rewards: Tensor) -> Tensor:
    return ck.combination_policy_loss(logits, old, masks, rewards)


def with_gradient(call, logits: Tensor, *args) -> tuple[Tensor, Tensor]:
    loss = call(logits, *args)
    return loss, torch.autograd.grad(loss, logits)[0]


def batches(count: int, packed: bool) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        logits, change = (torch.randn(N, 2, generator=generator) for _ in range(2))
        masks = torch.rand(G, N, generator=generator) < 0.1
        rewards = torch.rand(G, generator=generator).round()
        masks = ck.pack_masks(masks) if packed else masks
        found.append((logits.requires_grad_(), logits.detach() + 0.2 * change, masks, rewards))
    return found


BASELINES = {
    "published formula": published_formula,
    "fewest passes": fewest_passes,
    "torch.compile of it": torch.compile(fewest_passes, dynamic=False),
}


@pytest.mark.parametrize("contestant", ["ours", *BASELINES])
def bench_policy_loss(race, contestant):
    inputs = batches(20, packed=False)
    call = ours if contestant == "ours" else BASELINES[contestant]
    wanted = with_gradient(published_formula, *inputs[0])
    for mine, theirs in zip(with_gradient(call, *inputs[0]), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    race(
        f"policy loss, gradient {G} x {N}", contestant, lambda *args: with_gradient(call, *args), inputs,
        {"published formula": 80},
    )  # fmt: skip


@pytest.mark.parametrize("contestant", ["ours", "published formula"])
def bench_packed(race, contestant):
    """Masks that are packed already, as the sampler gives and a replay memory keeps them."""
    mine = contestant == "ours"
    call = ours if mine else published_formula
    inputs = batches(20, packed=mine)
    race(
        f"policy loss, packed masks {G} x {N}", contestant, lambda *args: with_gradient(call, *args), inputs,
        {"published formula": 80},
    )  # fmt: skip


@pytest.mark.parametrize("contestant", ["ours", "published formula"])
def bench_further_step(race, contestant):
    """A further step on one batch: the sums are there."""
    inputs = batches(20, packed=False)
    if contestant == "ours":
        sums = [(x[0], x[1], ck.combination_sums(x[2], x[3])) for x in inputs]
        call = lambda logits, old, s: with_gradient(lambda x, o: s.loss(x, o), logits, old)  # noqa: E731
        race(f"policy loss, further step {G} x {N}", contestant, call, sums, {"published formula": 200})
    else:
        call = lambda *args: with_gradient(published_formula, *args)  # noqa: E731
        race(f"policy loss, further step {G} x {N}", contestant, call, inputs)
