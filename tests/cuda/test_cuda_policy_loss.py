"""The policy loss as CUDA kernels: the CPU engine's bits of words, sums and gradients; the loss by tolerance."""

from __future__ import annotations

import math

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels.cuda import policy_loss as kernels
from cacovid_kernels.native import policy_loss as engine

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Every bit, but that of a NaN."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), wanted.isnan())
        found, wanted = found.nan_to_num(7.0), wanted.nan_to_num(7.0)
        assert torch.equal(found.signbit(), wanted.signbit())
    assert torch.equal(found, wanted)


def check_loss(logits, old, sums, low=0.2, high=0.28, kl=0.0):
    loss, gradient = kernels.policy_loss(logits, old, sums, low, high, kl)
    wanted = engine.policy_loss(logits, old, sums, low, high, kl)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=1e-12, equal_nan=True)
    same(gradient, wanted[1])


def batch(b, g, n, share=0.2, dtype=torch.float32):
    return engine.pack_masks(torch.rand(b * g, n) < share).view(b, g, -1), torch.randn(b, g).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 1024, 1025, 2500])
def test_masks_are_packed(dtype, n):
    masks = torch.randint(-3, 3, (5, n)).clamp(0).to(dtype)
    for given in (masks, masks.repeat_interleave(2, 1)[:, ::2], masks.t().contiguous().t(), masks[:0]):
        same(kernels.pack_masks(given), engine.pack_masks(given))


@pytest.mark.parametrize("n", [1, 32, 33, 700])
def test_positions_are_packed(n):
    indices = torch.randint(-1, n, (3, 300))
    indices[0, :9] = torch.tensor([-1, -2, n, n + 31, 2**62, -(2**62), 2**31, 0, n - 1])
    for given in (indices, indices.t().contiguous().t(), indices[:, ::3], indices[:, :0]):
        same(kernels.pack_indices(given, n), engine.pack_indices(given, n))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("balanced", [True, False])
def test_sums(dtype, balanced):
    for b, g, n in ((1, 1, 1), (2, 3, 40), (1, 31, 64), (2, 32, 65), (1, 33, 97), (1, 115, 200), (1, 7, 5000)):
        words, rewards = batch(b, g, n, dtype=dtype)
        if g > 2:
            rewards[:, 1] = 0.0
            words[:, 2] = 0
        words[:, :, -1] |= -(2**31)  # beyond the tokens of most
        for given in (rewards, rewards[:, :1].expand(b, g), rewards.t().contiguous().t()):
            same(kernels.policy_sums(words, given, n, balanced), engine.policy_sums(words, given, n, balanced))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_sums_of_odd_rewards(bad):
    words, rewards = batch(2, 40, 70, dtype=torch.float64)
    rewards[0, 35] = bad
    same(kernels.policy_sums(words, rewards, 70, True), engine.policy_sums(words, rewards, 70, True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_and_gradient(dtype, kl):
    for b, n in ((1, 1), (3, 40), (2, 300)):
        sums = torch.randn(b, 6, n, dtype=torch.float64)
        for pairs, old_pairs in ((False, False), (True, False), (False, True), (True, True)):
            logits = torch.randn(*(2, n, b)[not pairs :], dtype=torch.float64).to(dtype)
            logits = logits.permute(*range(logits.dim() - 1, -1, -1))
            old = torch.randn(b, 2 * n, 2)[:, ::2]
            check_loss(logits, old if old_pairs else old[..., 1], sums, kl=kl)


def test_loss_of_odd_values():
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 60.0, -60.0, 800.0, -800.0, 1e30, -1e30, 0.22])
    logits, old = (x.flatten()[None].double() for x in torch.meshgrid(odd, odd, indexing="ij"))
    for sums in (torch.ones(1, 6, logits.shape[1]).double(), torch.zeros(1, 6, logits.shape[1]).double()):
        for kl in (0.0, 0.1):
            check_loss(logits, old, sums, kl=kl)
    edge = torch.tensor([[1.0, 1.2, 0.8, 1.28, 1.5]]).double().log()
    check_loss(edge, torch.zeros(1, 5).double(), torch.randn(1, 6, 5, dtype=torch.float64), 0.0, 0.0)


def test_more_blocks_than_the_last_kernel_has_threads():
    sums = torch.randn(300, 6, 129, dtype=torch.float64)
    check_loss(torch.randn(300, 129), torch.randn(300, 129), sums)


def test_the_public_function():
    logits, masks, rewards = torch.randn(50, 2, requires_grad=True), torch.rand(6, 50) < 0.3, torch.randn(6)

    def run():
        loss = ck.combination_policy_loss(logits, torch.zeros(50), masks, rewards, kl_weight=0.1)
        return loss.detach(), *torch.autograd.grad(loss * 3, logits)

    found = run()
    with ck.use_backend("cpu"):
        wanted = run()
    torch.testing.assert_close(found[0], wanted[0])
    same(found[1], wanted[1])
