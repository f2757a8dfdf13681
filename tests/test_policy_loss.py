"""The policy loss: published vectors, the plain formula, bits of sums and masks, gradients, odd values, errors."""

from __future__ import annotations

import math

import pytest
import torch
from common import check_every_instruction_set, golden
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import _packed_masks as packed
from cacovid_kernels.ops import policy_loss as ops
from cacovid_kernels.reference.policy_loss import unpack_masks

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_masks(*shape: int, share: float = 0.2, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def plain(logits, old_logits, masks, rewards, *, balanced=True, eps_low=0.2, eps_high=0.28, kl_weight=0.0):
    """The formula, one (combination, token) at a time: logits `[N]` or `[N, 2]`, masks `[G, N]`."""

    def log_probs(x: Tensor) -> Tensor:
        pair = x if x.dim() == 2 else torch.stack([torch.zeros_like(x), x], -1)
        pair = pair.double() if x.dtype == torch.float64 else pair.float()
        return pair.log_softmax(-1).expand(masks.shape[0], -1, -1).gather(-1, masks.long()[..., None]).squeeze(-1)

    new, old = log_probs(logits), log_probs(old_logits)  # [G, N]
    rewards = rewards.to(new.dtype)
    deviation = rewards.std() if rewards.numel() > 1 else torch.zeros(())
    advantage = ((rewards - rewards.mean()) / (deviation + 1e-4))[:, None]
    ratio = (new - old).exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    distance = math.log(0.5) - new
    loss = loss + kl_weight * (distance.exp() - distance - 1) if kl_weight else loss
    if not balanced:
        return loss.mean()
    m = masks.to(new.dtype)
    share = m.mean(-1, keepdim=True)
    weight = m * (1 - share) + (1 - m) * share
    return ((loss * weight).sum(-1) / (weight.sum(-1) + 1e-7)).mean()


def value_and_gradient(call, logits: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = call(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", golden("policy_loss"))
@pytest.mark.parametrize("packed", [False, True])
def test_published_vectors(backend, vector, packed):
    logits, old, mask, reward, wanted = (
        torch.from_numpy(vector[name]) for name in ("logits", "old_logits", "mask", "reward", "grad")
    )
    options = {name: float(vector[name]) for name in ("eps_low", "eps_high", "kl_weight")}
    masks = ck.pack_masks(mask) if packed else mask
    loss, gradient = value_and_gradient(
        ck.combination_policy_loss, logits, old, masks, reward, balanced=bool(vector["balanced"]), **options
    )
    assert abs(loss.item() - vector["loss"].item()) <= 1e-6
    assert (gradient - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("n", [1, 2, 33, 64, 550])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_equals_the_plain_formula(backend, n, balanced, kl_weight):
    for seed, g in enumerate([1, 2, 5, 40]):
        masks = random_masks(g, n, share=0.3, seed=seed)
        rewards = randn(g, seed=seed, dtype=torch.float64).round()
        pairs, old = (randn(n, 2, seed=seed + i, dtype=torch.float64) for i in range(2))
        options = {"balanced": balanced, "kl_weight": kl_weight, "eps_low": 0.1, "eps_high": 0.4}
        for logits, before in ((pairs, old), (pairs[:, 0], old[:, 1]), (pairs, old[:, 0])):
            found = value_and_gradient(ck.combination_policy_loss, logits, before, masks, rewards, **options)
            wanted = value_and_gradient(plain, logits, before, masks, rewards, **options)
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_the_policy_that_drew_has_ratio_one(backend):
    """Nothing is clipped then: the gradient is that of the plain policy gradient."""
    logits, masks, rewards = randn(50), random_masks(9, 50), randn(9, seed=1)
    found = value_and_gradient(ck.combination_policy_loss, logits, logits, masks, rewards)
    wanted = value_and_gradient(plain, logits.double(), logits.double(), masks, rewards.double())
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("eps_low, eps_high", [(0.0, 0.0), (1.0, 0.5), (0.25, 1.0)])
def test_a_ratio_on_the_edge_still_pays(backend, eps_low, eps_high):
    """Ratios of exactly 1 + eps_high and 1 - eps_low, and next to them."""
    ratios = torch.tensor([1 - eps_low, 1 + eps_high, 1.0, 0.9 * (1 - eps_low) + 1e-9, 1.1 * (1 + eps_high)])
    p = 0.4 * ratios.double()
    logits, old = (p / (1 - p)).log(), torch.full((5,), math.log(0.4 / 0.6), dtype=torch.float64)
    masks = torch.tensor([[True], [False]]).expand(2, 5)
    options = {"eps_low": eps_low, "eps_high": eps_high, "balanced": False}
    for rewards in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        found = value_and_gradient(ck.combination_policy_loss, logits, old, masks, rewards, **options)[0]
        torch.testing.assert_close(found, plain(logits, old, masks, rewards.double(), **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pairs", [False, True])
def test_dtypes_strides_and_the_batch(backend, dtype, pairs):
    b, g, n = 3, 6, 70
    masks, rewards = random_masks(b, g, n), randn(b, g, seed=1)
    shape = (b, n, 2) if pairs else (b, n)
    wide = randn(*shape[::-1], seed=2, dtype=dtype).permute(*range(len(shape) - 1, -1, -1))
    old = randn(b, 2 * n, *shape[2:], seed=3)[:, ::2]
    loss, gradient = value_and_gradient(ck.combination_policy_loss, wide, old, masks, rewards, kl_weight=0.1)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert gradient.shape == wide.shape
    each = [
        value_and_gradient(plain, wide[i].double(), old[i].double(), masks[i], rewards[i].double(), kl_weight=0.1)
        for i in range(b)
    ]
    rtol, atol = {torch.bfloat16: (1e-2, 1e-6), torch.float16: (2e-3, 1e-6)}.get(dtype, (1e-5, 1e-9))
    torch.testing.assert_close(loss.double(), torch.stack([x for x, _ in each]).mean(), rtol=1e-5, atol=1e-7)
    wanted = torch.stack([x for _, x in each]) / b
    torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=atol)


def test_half_precision_gradients_are_scaled_before_they_are_rounded(backend):
    """A loss scaled up for float16 reaches the logits before anything is lost to its small range."""
    logits, masks, rewards = randn(6000), random_masks(8, 6000), randn(8, seed=1)
    half = logits.half().requires_grad_()
    (ck.combination_policy_loss(half, logits, masks, rewards) * 65536.0).backward()
    _, exact = value_and_gradient(plain, half.detach().double(), logits.double(), masks, rewards.double())
    torch.testing.assert_close(half.grad.double(), exact * 65536.0, rtol=1e-3, atol=1e-7)


def test_sums_serve_several_steps(backend):
    masks, rewards = random_masks(2, 7, 90), randn(2, 7)
    sums = ck.combination_sums(masks, rewards)
    assert sums.values.shape == (2, 6, 90)
    for step in range(3):
        logits, old = randn(2, 90, seed=step), randn(2, 90, seed=9)
        found = sums.loss(logits, old, kl_weight=0.2)
        assert torch.equal(found, ck.combination_policy_loss(logits, old, masks, rewards, kl_weight=0.2))


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_have_the_same_bits_as_the_reference(balanced, dtype, threads):
    for n, g, b in ((1, 1, 1), (40, 3, 2), (97, 40, 1), (2050, 115, 2)):
        words, rewards = ck.pack_masks(random_masks(b, g, n, share=0.1, seed=n)), randn(b, g, seed=n).to(dtype)
        if g > 2:
            rewards[:, 1] = 0.0
            words[:, 2] = 0
        for given in (rewards, rewards[:, :1].expand(b, g), rewards.t().contiguous().t()):
            found = ck.combination_sums(words, given, num_tokens=n, balanced=balanced).values
            with ck.use_backend("reference"):
                wanted = ck.combination_sums(words, given, num_tokens=n, balanced=balanced).values
            assert torch.equal(found.view(torch.int64), wanted.view(torch.int64))


def test_advantages_have_the_same_bits_whatever_the_rewards():
    """Of many groups: a root that is not the nearest float64 is off in one of a hundred."""
    words, rewards = ck.pack_masks(random_masks(2000, 9, 33, share=0.2)), randn(2000, 9)
    found = ck.combination_sums(words, rewards, num_tokens=33).values
    with ck.use_backend("reference"):
        wanted = ck.combination_sums(words, rewards, num_tokens=33).values
    assert torch.equal(found.view(torch.int64), wanted.view(torch.int64))


def test_bits_beyond_the_tokens_are_ignored(backend):
    words, rewards = ck.pack_masks(random_masks(5, 40)), randn(5)
    clean = ck.combination_sums(words, rewards, num_tokens=40).values
    words[:, 1] |= -256
    assert torch.equal(ck.combination_sums(words, rewards, num_tokens=40).values, clean)


def test_threads_do_not_change_the_loss(threads):
    masks, rewards, logits, old = random_masks(2, 9, 5000), randn(2, 9), randn(2, 5000), randn(2, 5000, seed=1)
    found = value_and_gradient(ck.combination_policy_loss, logits, old, masks, rewards)
    torch.set_num_threads(1)
    wanted = value_and_gradient(ck.combination_policy_loss, logits, old, masks, rewards)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


ISA_SCRIPT = """
import hashlib, torch, cacovid_kernels as ck
generator = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for n in (1, 31, 32, 63, 196, 700):
    masks, rewards = torch.rand(2, 9, n, generator=generator) < 0.2, torch.randn(2, 9, generator=generator)
    words, sums = ck.pack_masks(masks), ck.combination_sums(masks, rewards)
    logits = torch.randn(2, n, 2, generator=generator, requires_grad=True)
    loss = sums.loss(logits, logits.detach().flip(-1), kl_weight=0.1)
    loss.backward()
    for x in (words, sums.values, loss.detach(), logits.grad):
        digest.update(x.numpy().tobytes())
print(ck._C.cpu_isa, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_packing_masks(backend, dtype):
    for n in (0, 1, 7, 31, 32, 33, 64, 65, 500):
        bits = random_masks(3, 4, n, share=0.5, seed=n)
        masks = bits if dtype == torch.bool else bits * torch.randint(1, 100, bits.shape)
        masks = masks.to(dtype)
        for given in (
            masks,
            masks.repeat_interleave(3, 2)[..., ::3],
            masks.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            words = ck.pack_masks(given)
            assert words.dtype == torch.int32
            assert words.shape == (3, 4, math.ceil(n / 32))
            assert torch.equal(unpack_masks(words, n), bits)
            assert torch.equal(ck.pack_masks(torch.nn.functional.pad(bits, (0, -n % 32))), words)  # no other bits


def test_packing_indices(backend):
    for n in (1, 32, 33, 700):
        indices = torch.randint(-1, n, (4, 3, 9), generator=torch.Generator().manual_seed(n))
        indices[0, 0] = torch.tensor([-1, -2, n, n + 1, 2**62, -(2**62), 2**31, 0, n - 1])
        mask = torch.zeros(4, 3, n, dtype=torch.bool)
        for place in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(9)).tolist():
            at = indices[tuple(place)].item()
            if 0 <= at < n:
                mask[place[0], place[1], at] = True
        for given in (indices, indices.transpose(0, 2).contiguous().transpose(0, 2)):
            assert torch.equal(ck.pack_masks(indices=given, num_tokens=n), ck.pack_masks(mask))
    assert torch.equal(
        ck.pack_masks(indices=torch.zeros(2, 0, dtype=torch.int64), num_tokens=40), torch.zeros(2, 2).int()
    )


def test_combinations_pack_themselves(backend):
    drawn = ck.sample_combinations(
        randn(5, 30), randn(5), num_samples=4, num_frame_samples=3, keep_ratio=0.1, seed=1, mode="strict"
    )
    assert torch.equal(drawn.packed_mask(), ck.pack_masks(drawn.mask()))
    assert torch.equal(drawn.packed_frame_mask(), ck.pack_masks(drawn.frame_mask()))


# ---- odd values ---------------------------------------------------------------------------------


def test_nan_anywhere_makes_the_loss_nan(backend):
    logits, masks = randn(40), random_masks(5, 40)
    for balanced in (True, False):
        for bad in (math.nan, math.inf, -math.inf):
            for rewards in (torch.tensor([bad, 0.0, 1.0, 0.0, 1.0]), torch.full((5,), bad)):
                assert ck.combination_policy_loss(logits, logits, masks, rewards, balanced=balanced).isnan()
        for place in (0, 17, 39):
            broken = logits.clone()
            broken[place] = math.nan
            for rewards in (randn(5), torch.zeros(5)):
                for kl_weight in (0.0, 0.1):
                    options = {"balanced": balanced, "kl_weight": kl_weight}
                    assert ck.combination_policy_loss(broken, logits, masks, rewards, **options).isnan()
                    assert ck.combination_policy_loss(logits, broken, masks, rewards, **options).isnan()


def test_groups_without_a_difference_teach_nothing(backend):
    logits, old = randn(40), randn(40, seed=1)
    for g, value in ((1, 3.0), (6, 0.25), (6, 0.0)):
        loss, gradient = value_and_gradient(
            ck.combination_policy_loss, logits, old, random_masks(g, 40), torch.full((g,), value)
        )
        assert loss == 0
        assert not gradient.any()


def test_combinations_of_all_tokens_and_of_none(backend):
    masks = torch.stack([torch.ones(20), torch.zeros(20), torch.arange(20) % 2]).bool()
    logits, old, rewards = randn(20, dtype=torch.float64), randn(20, seed=1, dtype=torch.float64), torch.arange(3.0)
    for balanced in (True, False):
        args = (logits, old, masks, rewards.double())
        found = value_and_gradient(ck.combination_policy_loss, *args, balanced=balanced, kl_weight=0.1)
        wanted = value_and_gradient(plain, *args, balanced=balanced, kl_weight=0.1)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [50.0, 500.0, 650.0])
def test_certain_actions_neither_overflow_nor_cancel(backend, size):
    """Probabilities of e^-650, of which no difference to 1 is left."""
    logits = torch.tensor([size, -size, size - 1, 1 - size, 0.0], dtype=torch.float64)
    old = torch.tensor([size - 0.1, 0.2 - size, size, -size, 0.1], dtype=torch.float64)
    masks = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [1, 0, 1, 0, 1]])
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    found = value_and_gradient(ck.combination_policy_loss, logits, old, masks, rewards)
    wanted = value_and_gradient(plain, logits, old, masks, rewards)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-18)


def test_infinite_logits_are_no_wrong_number(backend):
    masks, rewards = torch.tensor([[1], [0]]), torch.tensor([1.0, 0.0])
    for new in (math.inf, -math.inf, 0.0, 1e30, -1e30):
        for old in (math.inf, -math.inf, 0.0, 1e30, -1e30):
            for kl_weight in (0.0, 0.1):
                loss = ck.combination_policy_loss(
                    torch.tensor([new]), torch.tensor([old]), masks, rewards, kl_weight=kl_weight, balanced=False
                )
                if kl_weight and new != 0.0:
                    assert loss.isnan() or loss > 1e28
                elif math.isinf(new) and new == old:
                    assert loss.isnan()
                elif new == old:
                    assert abs(loss) < 1e-6


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_gradcheck(backend, balanced, kl_weight):
    masks, rewards = random_masks(2, 4, 5, share=0.4), randn(2, 4)
    options = {"balanced": balanced, "kl_weight": kl_weight}
    for shape in ((2, 5), (2, 5, 2)):
        logits, old = (randn(*shape, seed=i, dtype=torch.float64) for i in range(2))
        assert torch.autograd.gradcheck(
            lambda x, o=old: ck.combination_policy_loss(x, o, masks, rewards, **options), logits.requires_grad_()
        )


def test_old_logits_and_rewards_are_constants(backend):
    logits, rewards = randn(20).requires_grad_(), randn(4).requires_grad_()
    ck.combination_policy_loss(logits, logits, random_masks(4, 20), rewards).backward()
    alone = value_and_gradient(ck.combination_policy_loss, logits, logits.detach(), random_masks(4, 20), rewards)
    assert torch.equal(logits.grad, alone[1])
    assert rewards.grad is None


def test_a_second_derivative_is_refused(backend):
    logits = randn(20).requires_grad_()
    loss = ck.combination_policy_loss(logits, randn(20, seed=1), random_masks(4, 20), randn(4))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="combination_policy_loss: it has no second derivative"):
        gradient.square().sum().backward()


def test_forward_mode_is_refused(backend):
    logits, masks, rewards = randn(20), random_masks(4, 20), randn(4)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ck.combination_policy_loss(x, logits, masks, rewards), (logits,), (logits,))


# ---- ordered draws ------------------------------------------------------------------------------


def ordered(logits, old, indices, rewards, eps_low=0.2, eps_high=0.28):
    ratio = (ck.pl_log_prob(logits, indices) - ck.pl_log_prob(old, indices)).exp()
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    advantage = advantage.view(-1, *[1] * (ratio.dim() - 1))
    return -torch.min(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage).mean()


@pytest.mark.parametrize("rows", [None, 3])
def test_ordered_draws(backend, rows):
    shape = (12,) if rows is None else (rows, 12)
    logits, old = (randn(*shape, seed=i, dtype=torch.float64) for i in range(2))
    indices, rewards = ck.gumbel_topk(old.float(), 4, num_samples=6, seed=3).indices, randn(6, dtype=torch.float64)
    options = {"likelihood": "plackett_luce"}
    found = value_and_gradient(ck.combination_policy_loss, logits, old, indices, rewards, **options)
    wanted = value_and_gradient(ordered, logits, old, indices, rewards)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(
        lambda x: ck.combination_policy_loss(x, old, indices, rewards, **options), logits.requires_grad_()
    )
    alone = ck.combination_policy_loss(logits, old, indices[:1], rewards[:1], **options)
    assert alone == 0


# ---- torch --------------------------------------------------------------------------------------


def test_opcheck():
    masks, rewards = random_masks(2, 5, 40), randn(2, 5)
    words = ck.pack_masks(masks)
    torch.library.opcheck(packed._pack_masks.dispatch, (masks[0],))
    torch.library.opcheck(packed._pack_indices.dispatch, (torch.tensor([[1, 5, -1]]), 40))
    torch.library.opcheck(ops._policy_sums.dispatch, (words, rewards, 40, True))
    sums = ck.combination_sums(masks, rewards).values
    for shape in ((2, 40), (2, 40, 2)):
        args = (randn(*shape).requires_grad_(), randn(*shape, seed=1), sums, 0.2, 0.28, 0.1)
        once = (*args[:2], words, rewards, True, 0.2, 0.28, 0.0)
        for op, given in ((ops._policy_loss, args), (ops._policy_loss_once, once)):
            torch.library.opcheck(
                op.dispatch, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
            )


def test_compiles_with_the_gradient():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(logits, old, masks, rewards):
        return ck.combination_policy_loss(logits * 2, old, masks, rewards, kl_weight=0.1) * 3

    for n in (40, 50):
        logits, args = randn(n).requires_grad_(), (randn(n, seed=1), random_masks(5, n), randn(5))
        (found,) = torch.autograd.grad(loss(logits, *args), logits)
        (wanted,) = torch.autograd.grad(ck.combination_policy_loss(logits * 2, *args, kl_weight=0.1) * 3, logits)
        assert torch.equal(found, wanted)


# ---- errors -------------------------------------------------------------------------------------

LOGITS, MASKS, REWARDS = torch.zeros(40), torch.zeros(3, 40, dtype=torch.bool), torch.zeros(3)
WRONG = [
    ({"token_logits": [1.0]}, TypeError, "token_logits must be a tensor, got list"),
    ({"token_logits": torch.zeros(40).long()}, TypeError, "token_logits must be float32, bfloat16, float16 or float64"),
    ({"old_logits": torch.zeros(39)}, ValueError, r"old_logits must be \[40\] or \[40, 2\] for combinations of 40 tok"),
    ({"token_logits": torch.zeros(40, 3)}, ValueError, r"token_logits must be \[40\] or \[40, 2\]"),
    ({"token_logits": torch.zeros(1, 40)}, ValueError, r"token_logits must be \[40\] or \[40, 2\]"),
    ({"token_logits": torch.zeros(())}, ValueError, "token_logits must be"),
    ({"masks": MASKS.float()}, TypeError, "masks must be bool or integers"),
    ({"masks": MASKS[0]}, ValueError, r"masks must be \[G, N\] or \[B, G, N\] with one reward each"),
    ({"masks": MASKS[:2]}, ValueError, "with one reward each"),
    ({"rewards": [1.0, 2.0, 3.0]}, TypeError, "rewards must be a tensor"),
    ({"rewards": torch.zeros(3, 1)}, ValueError, "with one reward each"),
    ({"masks": MASKS[:0], "rewards": REWARDS[:0]}, ValueError, "there must be tokens and combinations"),
    ({"masks": MASKS[:, :0], "token_logits": LOGITS[:0]}, ValueError, "there must be tokens and combinations"),
    ({"eps_low": 1.5}, ValueError, r"eps_low=1.5 must be a number in \[0, 1\]"),
    ({"eps_high": -0.1}, ValueError, "eps_high=-0.1 must be a number in"),
    ({"kl_weight": math.nan}, ValueError, "kl_weight=nan must be a number in"),
    ({"likelihood": "both"}, ValueError, "likelihood='both' must be one of"),
    ({"likelihood": "plackett_luce"}, TypeError, "masks must be int64 indices with likelihood"),
    ({"likelihood": "plackett_luce", "kl_weight": 0.1, "masks": MASKS.long()}, ValueError, "kl_weight=0.1 must be 0"),
    ({"likelihood": "plackett_luce", "masks": MASKS[0].long()}, ValueError, r"ordered draws \[G, K\] need logits"),
    ({"likelihood": "plackett_luce", "masks": MASKS[:2].long()}, ValueError, "one reward for each draw"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, message", WRONG)
def test_errors(change, kind, message):
    arguments = {"token_logits": LOGITS, "old_logits": LOGITS, "masks": MASKS, "rewards": REWARDS, **change}
    with pytest.raises(kind, match=f"^combination_policy_loss: .*{message}"):
        ck.combination_policy_loss(**arguments)


def test_errors_of_packing():
    with pytest.raises(ValueError, match="pack_masks: pass either masks, or indices and num_tokens"):
        ck.pack_masks()
    with pytest.raises(ValueError, match="pack_masks: pass either"):
        ck.pack_masks(indices=torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="pack_masks: num_tokens=0 must be positive"):
        ck.pack_masks(indices=torch.zeros(2, 3).long(), num_tokens=0)
    with pytest.raises(TypeError, match="pack_masks: indices must be int64"):
        ck.pack_masks(indices=torch.zeros(2, 3).int(), num_tokens=5)
    with pytest.raises(TypeError, match="pack_masks: masks must be bool or integers"):
        ck.pack_masks(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"packed masks of num_tokens=40 must be \[..., 2\] int32"):
        ck.combination_sums(MASKS, REWARDS, num_tokens=40)
