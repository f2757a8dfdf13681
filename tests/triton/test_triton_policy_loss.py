"""The policy loss in Triton against the CPU engine: the same bits of words, sums and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.ops import _packed_masks as packed
from cacovid_kernels.ops import policy_loss as ops
from cacovid_kernels.triton import policy_loss, policy_sums

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(found, wanted):
    """Every bit, but that of a NaN."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), wanted.isnan())
        found, wanted = found.nan_to_num(7.0), wanted.nan_to_num(7.0)
    assert torch.equal(bits(found), bits(wanted))


def check(op, *args):
    with ck.use_backend("cpu"):
        wanted = op(*args)
    found = op(*args)
    same(found, wanted)
    return found


def check_loss(logits, old, sums, low=0.2, high=0.28, kl=0.0):
    with ck.use_backend("cpu"):
        wanted = ops._policy_loss(logits, old, sums, low, high, kl)
    loss, gradient = ops._policy_loss(logits, old, sums, low, high, kl)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=1e-12, equal_nan=True)
    same(gradient, wanted[1])


def batch(b, g, n, share=0.2, dtype=torch.float32):
    words = packed.pack_masks(torch.rand(b, g, n) < share)
    return words, torch.randn(b, g, dtype=torch.float64).to(dtype)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    for module in (policy_loss, policy_sums):

        def counted(kernel, *args, launch=module.launch, **options):
            names.append(kernel.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "index"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 1100])
def test_masks_are_packed(dtype, n):
    masks = torch.randint(-3, 3, (3, n)).clamp(0).to(dtype)
    for given in (masks, masks.repeat_interleave(2, 1)[:, ::2], masks.t().contiguous().t()):
        check(packed._pack_masks, given)


@pytest.mark.parametrize("n", [1, 32, 33, 700])
def test_positions_are_packed(n):
    indices = torch.randint(-1, n, (3, 300))
    indices[0, :9] = torch.tensor([-1, -2, n, n + 31, 2**62, -(2**62), 2**31, 0, n - 1])
    for given in (indices, indices.t().contiguous().t(), indices[:, ::3], indices[:, :0]):
        check(packed._pack_indices, given, n)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("balanced", [True, False])
def test_sums(dtype, balanced):
    for b, g, n in ((1, 1, 1), (2, 3, 40), (1, 40, 97), (1, 7, 130)):
        words, rewards = batch(b, g, n, dtype=dtype)
        if g > 2:
            rewards[:, 1] = 0.0
            words[:, 2] = 0
        words[:, :, -1] |= -(2**31)  # beyond the tokens of most
        views = (rewards, rewards[:, :1].expand(b, g), rewards.t().contiguous().t())
        for given in views if b > 1 else views[:1]:
            check(ops._policy_sums, words, given, n, balanced)


def test_words_of_several_blocks(monkeypatch):
    monkeypatch.setattr(policy_sums, "COUNTED", 32)
    words, rewards = batch(1, 3, 2100)
    check(ops._policy_sums, words, rewards, 2100, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_sums_of_odd_rewards(bad):
    words, rewards = batch(2, 5, 40, dtype=torch.float64)
    rewards[0, 3] = bad
    sums = check(ops._policy_sums, words, rewards, 40, True)
    assert (
        math.isfinite(bad) or ops._policy_loss(torch.zeros(2, 40), torch.zeros(2, 40), sums, 0.2, 0.28, 0.0)[0].isnan()
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_and_gradient(dtype, kl):
    for b, n in ((1, 1), (3, 40), (2, 300)):
        sums = torch.randn(b, 6, n, dtype=torch.float64)
        sums[:, 1::2].abs_().neg_()
        for pairs, old_pairs in ((False, False), (True, False), (False, True), (True, True)):
            logits = torch.randn(*(2, n, b)[not pairs :], dtype=torch.float64).to(dtype)
            logits = logits.permute(*range(logits.dim() - 1, -1, -1))
            old = torch.randn(b, 2 * n, 2)[:, ::2].select(2, 1) if not old_pairs else torch.randn(b, 2 * n, 2)[:, ::2]
            check_loss(logits, old, sums, kl=kl)


def test_loss_of_odd_values():
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 60.0, -60.0, 800.0, -800.0, 1e30, -1e30, 0.22])
    logits, old = (x.flatten()[None].double() for x in torch.meshgrid(odd, odd, indexing="ij"))
    for sums in (torch.ones(1, 6, logits.shape[1]).double(), torch.zeros(1, 6, logits.shape[1]).double()):
        for kl in (0.0, 0.1):
            check_loss(logits, old, sums, kl=kl)
    edge = torch.tensor([[1.0, 1.2, 0.8, 1.28, 1.5]]).double().log()
    check_loss(edge, torch.zeros(1, 5).double(), torch.randn(1, 6, 5, dtype=torch.float64), 0.0, 0.0)


def test_many_programs(monkeypatch):
    monkeypatch.setattr(policy_loss, "PARTS", 16)
    sums = torch.randn(20, 6, 300, dtype=torch.float64)
    check_loss(torch.randn(20, 300), torch.randn(20, 300), sums)


def test_the_public_function(launches):
    logits, masks, rewards = torch.randn(50, 2, requires_grad=True), torch.rand(6, 50) < 0.3, torch.randn(6)
    found = ck.combination_policy_loss(logits, torch.zeros(50), masks, rewards, kl_weight=0.1)
    (gradient,) = torch.autograd.grad(found * 3, logits)
    with ck.use_backend("cpu"):
        loss = ck.combination_policy_loss(logits, torch.zeros(50), masks, rewards, kl_weight=0.1)
        same(gradient, torch.autograd.grad(loss * 3, logits)[0])
    assert launches == ["_pack_kernel", "_weights_kernel", "_sums_kernel", "_loss_kernel", "_total_kernel"]
    launches.clear()
    sums = ck.combination_sums(masks, rewards, balanced=False)
    sums.loss(logits, torch.zeros(50))
    assert launches == ["_pack_kernel", "_sums_kernel", "_loss_kernel", "_total_kernel"]


def test_nothing_is_read_on_the_host():
    masks, indices = torch.rand(6, 50) < 0.3, torch.randint(-1, 50, (6, 9))
    rewards, logits = torch.randn(1, 6), torch.randn(1, 50)
    with NoHostReads():
        policy_loss.pack_indices(indices, 50)
        sums = policy_loss.policy_sums(policy_loss.pack_masks(masks)[None], rewards, 50, True)
        loss, gradient = policy_loss.policy_loss(logits, logits, sums, 0.2, 0.28, 0.1)
        policy_loss.policy_loss_backward(loss, gradient, logits)
