"""gumbel_topk and pl_log_prob: the op contract, odd values, gradients, backends."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from common import check_every_instruction_set, check_fork
from hypothesis import given, settings
from hypothesis import strategies as st

import cacovid_kernels as ck
from cacovid_kernels.ops import sample as ops
from cacovid_kernels.reference.random import gumbel_noise, random_bits

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(call):
    results = []
    for name in ("reference", "cpu"):
        with ck.use_backend(name):
            results.append(call())
    return results


def assert_same(a: ck.GumbelSample, b: ck.GumbelSample) -> None:
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.status, b.status)
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=1e-6, atol=1e-6)


# ---- gumbel_topk --------------------------------------------------------------------------------


def test_definition(backend):
    """The k largest of logits + noise, in falling order."""
    logits = randn(3, 50)
    sample = ck.gumbel_topk(logits, 7, num_samples=2, seed=5, step=6, stream=7)
    for s in range(2):
        row, column = torch.arange(3)[:, None], torch.arange(50)
        noise = gumbel_noise(random_bits(column, row, torch.full_like(row, s), 5, 6, 7))
        assert torch.equal(sample.indices[s], (logits + noise).topk(7).indices)


def test_shapes(backend):
    logits = randn(4, 3, 9)
    one, many = ck.gumbel_topk(logits, 2, seed=1), ck.gumbel_topk(logits, 2, num_samples=5, seed=1)
    assert one.indices.shape == (4, 3, 2)
    assert one.log_prob.shape == one.status.shape == one.n_valid.shape == (4, 3)
    assert many.indices.shape == (5, 4, 3, 2)
    assert many.log_prob.shape == many.n_valid.shape == (5, 4, 3)
    assert many.status.shape == (4, 3)
    assert torch.equal(many.indices[0], one.indices)
    flat = ck.gumbel_topk(logits.reshape(12, 9), 2, seed=1)
    assert torch.equal(flat.indices, one.indices.reshape(12, 2))
    row = ck.gumbel_topk(logits[0, 0], 2, seed=1)
    assert row.indices.shape == (2,)
    assert row.log_prob.shape == row.status.shape == ()
    assert torch.equal(row.indices, one.indices[0, 0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize("samples", [None, 0, 2])
def test_empty(shape, samples, backend):
    sample = ck.gumbel_topk(torch.zeros(shape), 0, num_samples=samples, seed=1)
    lead = shape[:-1] if samples is None else (samples, *shape[:-1])
    assert sample.indices.shape == (*lead, 0)
    assert torch.equal(sample.log_prob, torch.zeros(lead))
    assert torch.equal(sample.status, torch.zeros(shape[:-1], dtype=torch.int32))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 196, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_equals_reference(n, dtype):
    logits = randn(3, n, seed=n).to(dtype)
    for k in sorted({0, 1, n // 3, n}):
        reference, engine = both(lambda k=k: ck.gumbel_topk(logits, k, num_samples=3, seed=n, step=k))
        assert_same(engine, reference)
        drawn = engine.indices.sort(-1).values
        assert (drawn.diff(dim=-1) > 0).all()  # nobody is drawn twice


def test_all_are_drawn_when_k_is_n(backend):
    sample = ck.gumbel_topk(randn(2, 33), 33, num_samples=4, seed=3)
    assert torch.equal(sample.indices.sort(-1).values, torch.arange(33).expand(4, 2, 33))


def test_a_smaller_k_draws_the_first_of_them(backend):
    logits = randn(2, 100)
    large = ck.gumbel_topk(logits, 60, num_samples=3, seed=9).indices
    for k in (1, 7, 59):
        assert torch.equal(ck.gumbel_topk(logits, k, num_samples=3, seed=9).indices, large[..., :k])


def test_a_draw_depends_on_its_name_alone(backend):
    """Not on batch-mates, the number of samples, columns that have no chance, or the strides."""
    logits = randn(6, 40)
    sample = ck.gumbel_topk(logits, 5, num_samples=4, seed=2, step=3)
    others = randn(6, 40, seed=1)
    others[4] = logits[4]
    assert torch.equal(ck.gumbel_topk(others, 5, num_samples=4, seed=2, step=3).indices[:, 4], sample.indices[:, 4])
    assert torch.equal(ck.gumbel_topk(logits[:3], 5, num_samples=2, seed=2, step=3).indices, sample.indices[:2, :3])
    wide = torch.cat([logits, torch.full((6, 30), -INF)], 1)
    assert torch.equal(ck.gumbel_topk(wide, 5, num_samples=4, seed=2, step=3).indices, sample.indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_stride_gives_the_same_bits(dtype, backend):
    logits = randn(5, 70).to(dtype)
    wanted = ck.gumbel_topk(logits, 9, num_samples=2, seed=4)
    memory = torch.zeros(5 * 70 * 3 + 7, dtype=dtype)
    strided = memory[7:].as_strided((5, 70), (3, 15))
    strided.copy_(logits)
    assert_same(ck.gumbel_topk(strided, 9, num_samples=2, seed=4), wanted)
    assert_same(ck.gumbel_topk(logits.t().contiguous().t(), 9, num_samples=2, seed=4), wanted)
    broadcast = ck.gumbel_topk(logits[0].expand(5, 70), 9, num_samples=2, seed=4)
    assert_same(broadcast, ck.gumbel_topk(logits[0].repeat(5, 1), 9, num_samples=2, seed=4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [0, 2**32 - 1])
@pytest.mark.parametrize("stream", [0, 239])
def test_extreme_keys(seed, step, stream):
    assert_same(*both(lambda: ck.gumbel_topk(randn(2, 30), 5, num_samples=2, seed=seed, step=step, stream=stream)))


def test_seeds_are_64_bits(backend):
    def indices(seed):
        return ck.gumbel_topk(torch.zeros(64), 64, seed=seed).indices

    assert torch.equal(indices(-1), indices(2**64 - 1))
    assert torch.equal(indices(-(2**63)), indices(2**63))
    distinct = [indices(seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(distinct, 2))


def test_integers_of_any_kind(backend):
    wanted = ck.gumbel_topk(randn(2, 9), 3, num_samples=2, seed=8, step=1, stream=2)
    numbers = {"num_samples": np.int32(2), "seed": np.uint64(8), "step": torch.tensor(1), "stream": np.int8(2)}
    assert_same(ck.gumbel_topk(randn(2, 9), np.int64(3), **numbers), wanted)


def test_odd_logits(backend):
    logits = torch.zeros(7, 6)
    logits[0, [1, 4]] = INF  # first, by index
    logits[1, :5] = -INF
    logits[2, 2] = NAN
    logits[3] = NAN
    logits[4] = torch.tensor([-INF, NAN, INF, 3e38, -3e38, 1e-45])
    logits[5] = INF
    sample = ck.gumbel_topk(logits, 4, num_samples=50, seed=3)
    status = ck.Status
    assert sample.status.tolist() == [
        status.POSINF, status.SHORT, status.NAN, status.NAN | status.SHORT, status.NAN | status.POSINF,
        status.POSINF, 0,
    ]  # fmt: skip
    assert torch.equal(sample.indices[:, 0, :2], torch.tensor([1, 4]).expand(50, 2))
    assert sample.indices[:, 1].tolist() == [[5, -1, -1, -1]] * 50
    assert (sample.indices[:, 2] != 2).all()
    assert (sample.indices[:, 3] == -1).all()
    assert sample.indices[:, 4].tolist() == [[2, 3, 5, 4]] * 50
    assert sample.indices[:, 5].tolist() == [[0, 1, 2, 3]] * 50
    assert sample.n_valid[0].tolist() == [4, 1, 4, 0, 4, 4, 4]
    assert torch.equal(sample.log_prob[:, [1, 3, 4, 5]], torch.zeros(50, 4))
    assert torch.allclose(sample.log_prob[:, 0], torch.tensor(-math.log(12)))  # two of the four finite ones
    assert torch.allclose(sample.log_prob[:, 6], torch.tensor(-math.log(360)))


def test_check_raises(backend):
    for logits, name in (([0, NAN, 1], "NAN"), ([0, INF, 1], "POSINF"), ([0, -INF, -INF], "SHORT")):
        with pytest.raises(ValueError, match=rf"gumbel_topk: row 1 has {name} values"):
            ck.gumbel_topk(torch.tensor([[0.0, 0, 0], logits]), 2, seed=0, check="raise")


def test_ties_go_to_the_lower_index(backend):
    """Logits so large that the noise is rounded away."""
    logits = torch.full((2, 40), 1e30)
    logits[1, 5] = 2e30
    assert ck.gumbel_topk(logits, 4, seed=0).indices.tolist() == [[0, 1, 2, 3], [5, 0, 1, 2]]


def test_log_prob_is_pl_log_prob(backend):
    logits = randn(3, 30) * 20
    logits[1, 4] = -INF
    sample = ck.gumbel_topk(logits, 6, num_samples=4, seed=1)
    assert torch.equal(sample.log_prob, ck.pl_log_prob(logits, sample.indices))


def test_log_prob_carries_the_gradient(backend):
    logits = randn(2, 8).requires_grad_()
    sample = ck.gumbel_topk(logits, 3, num_samples=5, seed=1)
    (found,) = torch.autograd.grad(sample.log_prob.sum(), logits)
    (wanted,) = torch.autograd.grad(ck.pl_log_prob(logits, sample.indices).sum(), logits)
    assert torch.equal(found, wanted)
    assert not sample.indices.requires_grad
    with torch.no_grad():
        assert not ck.gumbel_topk(logits, 3, seed=1).log_prob.requires_grad


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 4), n=st.integers(1, 80), share=st.floats(0, 1), samples=st.integers(1, 6),
    seed=st.integers(-(2**63), 2**64 - 1), scale=st.sampled_from([0.0, 1.0, 30.0, 1e30]),
    holes=st.floats(0, 1), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_engine_equals_reference_on_anything(rows, n, share, samples, seed, scale, holes, dtype):
    generator = torch.Generator().manual_seed(seed & 0xFFFF)
    logits = torch.randn(rows, n, generator=generator) * scale
    odd = torch.tensor([-INF, NAN, INF])[torch.randint(0, 3, (rows, n), generator=generator)]
    logits = torch.where(torch.rand(rows, n, generator=generator) < holes / 2, odd, logits).to(dtype)
    k = round(share * n)
    assert_same(*both(lambda: ck.gumbel_topk(logits, k, num_samples=samples, seed=seed, step=7)))


# ---- pl_log_prob --------------------------------------------------------------------------------


def chain_of_softmaxes(logits: torch.Tensor, drawn: list[int]) -> torch.Tensor:
    left, total = logits.double().clone(), torch.zeros((), dtype=torch.float64)
    for item in drawn:
        total = total + left.log_softmax(0)[item]
        left = left.masked_fill(torch.arange(len(left)) == item, -INF)
    return total


def test_log_prob_is_a_chain_of_softmaxes(backend):
    for n, k, scale in ((5, 3, 1.0), (40, 40, 1.0), (40, 7, 100.0), (40, 39, 700.0)):
        logits = randn(2, n, seed=n).double() * scale
        drawn = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:k] for i in range(6)])
        found = ck.pl_log_prob(logits, drawn.reshape(3, 2, k))
        for s in range(3):
            for r in range(2):
                wanted = chain_of_softmaxes(logits[r], drawn[2 * s + r].tolist())
                torch.testing.assert_close(found[s, r], wanted, rtol=1e-13, atol=1e-12)


def test_probabilities_of_all_draws_sum_to_one(backend):
    logits = randn(5).double() * 2
    draws = torch.tensor(list(itertools.permutations(range(5), 3)))
    assert ck.pl_log_prob(logits, draws).exp().sum().item() == pytest.approx(1, abs=1e-14)


def test_nothing_cancels(backend):
    """The part that was not drawn may be as small as it likes."""
    logits = torch.tensor([0.0, -40.0, -80.0, -120.0], dtype=torch.float64)
    found = ck.pl_log_prob(logits, torch.tensor([0, 1, 2]))
    exact = -math.log1p(math.exp(-40) + math.exp(-80) + math.exp(-120)) - 2 * math.log1p(math.exp(-40))
    assert found.item() == pytest.approx(exact, rel=1e-9)
    assert ck.pl_log_prob(logits, torch.tensor([3, 2, 1, 0])).item() == pytest.approx(-240, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_dtypes(dtype, backend):
    logits, drawn = randn(3, 9).to(dtype), torch.tensor([[0, 4], [8, 1], [2, 3]])
    found = ck.pl_log_prob(logits, drawn)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), ck.pl_log_prob(logits.double(), drawn), rtol=1e-6, atol=1e-6)
    assert torch.equal(ck.pl_log_prob(logits, drawn.int()), found)
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ck.pl_log_prob(leaf, drawn).sum(), leaf)
    exact = logits.double().requires_grad_()
    (wanted,) = torch.autograd.grad(ck.pl_log_prob(exact, drawn).sum(), exact)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wanted.to(dtype), rtol=1e-6, atol=1e-6)


def test_any_stride(backend):
    logits, drawn = randn(4, 20), torch.stack([torch.randperm(20)[:5] for _ in range(12)]).reshape(3, 4, 5)
    wanted = ck.pl_log_prob(logits, drawn)
    strided = torch.zeros(4, 60)[:, ::3].copy_(logits)
    turned = drawn.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(ck.pl_log_prob(strided, turned), wanted)
    assert torch.equal(ck.pl_log_prob(logits, drawn[0]), wanted[0])


def test_odd_draws(backend):
    logits = torch.tensor([0.0, 1.0, -INF, NAN, 2.0])
    drawn = torch.tensor([
        [0, 1, -1], [-1, 0, 1], [0, 2, -1], [0, 0, -1], [3, 0, -1], [0, 5, 1], [0, -2, 1], [0, 2**62, -1],
        [-1, -1, -1],
    ])  # fmt: skip
    found = ck.pl_log_prob(logits, drawn)
    plain = chain_of_softmaxes(torch.tensor([0.0, 1.0, 2.0]), [0, 1])
    assert found[:2].tolist() == pytest.approx([plain.item()] * 2)
    assert found[2:4].tolist() == [-INF, -INF]
    assert torch.isnan(found[4:8]).all()
    assert found[8] == 0
    leaf = logits.clone().requires_grad_()
    grads = [torch.autograd.grad(ck.pl_log_prob(leaf, row), leaf, create_graph=True)[0] for row in drawn]
    assert all(torch.isfinite(g).all() for g in grads)
    assert all((g == 0).all() for g in grads[2:])
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in grads), leaf)
    assert torch.isfinite(second).all()


def test_infinite_logits_come_first(backend):
    logits = torch.tensor([INF, 0.0, INF, 1.0]).requires_grad_()
    found = ck.pl_log_prob(logits, torch.tensor([[0, 2, 3], [2, 0, 1], [0, 1, 2], [0, 2, -1]]))
    assert found.tolist() == pytest.approx([-math.log1p(math.exp(-1)), -math.log1p(math.exp(1)), -INF, 0])
    (grad,) = torch.autograd.grad(found[0], logits)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    assert torch.allclose(grad, torch.stack([torch.zeros(()), -p[0], torch.zeros(()), 1 - p[1]]))


GRADIENT_CASES = {
    "some": (randn(2, 6).double(), [[[0, 3, 5], [1, 2, 4]], [[5, 4, 0], [3, 2, 1]]]),
    "all": (randn(1, 4).double(), [[[2, 0, 3, 1]]]),
    "padded": (randn(1, 5).double(), [[[-1, 3, -1]], [[-1, -1, -1]]]),
    "far apart": (torch.tensor([[0.0, -900.0, 300.0, 299.0, -901.0]], dtype=torch.float64), [[[2, 3, 0]]]),
    "none": (randn(1, 3).double(), [[[]]]),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(case, backend):
    logits, drawn = GRADIENT_CASES[case]
    drawn = torch.tensor(drawn, dtype=torch.int64)
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ck.pl_log_prob(x, drawn), (leaf,))
    assert torch.autograd.gradgradcheck(lambda x: ck.pl_log_prob(x, drawn), (leaf,))


def test_score_function_has_mean_zero(backend):
    """Over all draws: sum of P * d ln P / d logits = 0."""
    logits = randn(5).double().requires_grad_()
    draws = torch.tensor(list(itertools.permutations(range(5), 2)))
    log_prob = ck.pl_log_prob(logits, draws)
    (grad,) = torch.autograd.grad((log_prob.exp().detach() * log_prob).sum(), logits)
    assert grad.abs().max() < 1e-14


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 3), n=st.integers(1, 30), k=st.integers(0, 30), samples=st.integers(0, 4),
    seed=st.integers(0, 999), scale=st.sampled_from([1.0, 50.0, 3000.0]), odd=st.booleans(),
)  # fmt: skip
def test_engine_equals_reference_with_gradients(rows, n, k, samples, seed, scale, odd):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, n, generator=generator, dtype=torch.float64) * scale
    order = torch.rand(samples, rows, n, generator=generator).argsort(-1)
    drawn = order[..., : min(k, n)]
    if odd:
        values = torch.tensor([-INF, INF, NAN])[torch.randint(0, 3, (rows, n), generator=generator)]
        logits = torch.where(torch.rand(rows, n, generator=generator) < 0.1, values.double(), logits)
        swap = torch.rand(drawn.shape, generator=generator) < 0.1
        drawn = torch.where(swap, torch.randint(-2, n + 2, drawn.shape, generator=generator), drawn)

    def everything():
        leaf, weight = logits.clone().requires_grad_(), torch.linspace(0.5, 1, samples * rows).reshape(samples, rows)
        weight = weight.double().requires_grad_()
        value = ck.pl_log_prob(leaf, drawn)
        (first,) = torch.autograd.grad(value, leaf, weight, create_graph=True)
        direction = torch.linspace(-1, 1, rows * n, dtype=torch.float64).reshape(rows, n)
        return value, first, *torch.autograd.grad(first, (leaf, weight), direction)

    for found, wanted in zip(*both(everything), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


# ---- errors -------------------------------------------------------------------------------------

ROW = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((ROW, 6), {}, ValueError, r"k=6 must be in \[0, N=5\] \(logits: \[2, 5\] float32 cpu\)"),
        ((ROW, -1), {}, ValueError, r"k=-1 must be in"),
        ((ROW, 2.0), {}, TypeError, r"k=2.0 must be an integer"),
        ((torch.zeros(()), 0), {}, ValueError, r"logits must be \[\.\.\., N\]"),
        ((ROW.double(), 1), {}, TypeError, r"logits must be float32, bfloat16 or float16"),
        ((ROW.long(), 1), {}, TypeError, r"logits must be float32"),
        (([0.0], 1), {}, TypeError, r"logits must be a tensor, got list"),
        ((ROW.to_sparse(), 1), {}, TypeError, r"logits must be strided"),
        ((ROW, 1), {"seed": 2**64}, ValueError, r"seed=18446744073709551616 must be in"),
        ((ROW, 1), {"seed": -(2**63) - 1}, ValueError, r"seed=-9223372036854775809 must be in"),
        ((ROW, 1), {"seed": 1.5}, TypeError, r"seed=1.5 must be an integer"),
        ((ROW, 1), {"step": 2**32}, ValueError, r"step=4294967296 must be in"),
        ((ROW, 1), {"step": -1}, ValueError, r"step=-1 must be in"),
        ((ROW, 1), {"stream": 240}, ValueError, r"stream=240 must be in \[0, 240\)"),
        ((ROW, 1), {"num_samples": -1}, ValueError, r"num_samples=-1 must be in \[0, 2\^24\]"),
        ((ROW, 1), {"num_samples": 2**24 + 1}, ValueError, r"num_samples=16777217 must be in"),
        ((ROW, 1), {"check": "maybe"}, ValueError, r"check='maybe' must be one of"),
    ],
)
def test_gumbel_errors(args, options, error, message):
    with pytest.raises(error, match=f"^gumbel_topk: {message}"):
        ck.gumbel_topk(*args, **{"seed": 0, **options})


@pytest.mark.parametrize(
    ("logits", "indices", "error", "message"),
    [
        (ROW, torch.zeros(2, 1), TypeError, r"indices must be int64 or int32 \(indices: \[2, 1\] float32 cpu\)"),
        (ROW, [0], TypeError, r"indices must be int64 or int32 \(indices: list\)"),
        (ROW.int(), torch.zeros(2, 1).long(), TypeError, r"logits must be float32"),
        (ROW, torch.zeros(3, 1).long(), ValueError, r"indices must have the rows of logits, \[2\]"),
        (ROW, torch.zeros(1).long(), ValueError, r"indices must have the dimensions of logits"),
        (ROW, torch.zeros(2, 1, device="meta").long(), ValueError, r"indices is on meta but logits on cpu"),
    ],
)
def test_log_prob_errors(logits, indices, error, message):
    with pytest.raises(error, match=f"^pl_log_prob: {message}"):
        ck.pl_log_prob(logits, indices)


def test_engine_refuses_what_would_write_out_of_bounds():
    engine, x = ck._C, torch.zeros(2, 5)
    small, fine = torch.empty(3, dtype=torch.int64), torch.empty(1, 2, 2, dtype=torch.int64)
    log_prob, status = torch.empty(1, 2), torch.empty(2, dtype=torch.int32)
    for args in (
        (x, 2, 1, 0, 0, 0, 1, small, log_prob, status),
        (x, 6, 1, 0, 0, 0, 1, fine, log_prob, status),
        (x, 2, 1, 0, 0, 256, 1, fine, log_prob, status),
        (x, 2, 1, 0, 2**32, 0, 1, fine, log_prob, status),
        (x, 2, 1, 0, 0, 0, 1, fine, log_prob, status[:1]),
        (x.long(), 2, 1, 0, 0, 0, 1, fine, log_prob, status),
        (x[0], 2, 1, 0, 0, 0, 1, fine, log_prob, status),
    ):
        with pytest.raises(ValueError, match="must"):
            engine.gumbel_topk(*args)
    with pytest.raises(ValueError, match="same rows"):
        engine.pl_log_prob(x, torch.zeros(1, 3, 2, dtype=torch.int64), 1, torch.empty(1, 3, dtype=torch.float64))


# ---- threads, processes, instruction sets, devices ----------------------------------------------


def test_result_does_not_depend_on_threads(threads):
    logits = randn(70, 300)
    sample = ck.gumbel_topk(logits, 30, num_samples=40, seed=1)
    torch.set_num_threads(1)
    alone = ck.gumbel_topk(logits, 30, num_samples=40, seed=1)
    assert torch.equal(sample.indices, alone.indices)
    assert torch.equal(sample.log_prob, alone.log_prob)
    torch.set_num_threads(threads)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(ck.pl_log_prob(leaf, sample.indices).sum(), leaf)
    torch.set_num_threads(1)
    (grad_alone,) = torch.autograd.grad(ck.pl_log_prob(leaf, sample.indices).sum(), leaf)
    assert torch.equal(grad, grad_alone)


def test_fork_after_an_op_does_not_hang():
    check_fork(lambda: int(ck.gumbel_topk(torch.zeros(90, 300), 9, num_samples=9, seed=1).indices.sum()))


ISA_SCRIPT = """
import hashlib, torch, cacovid_kernels as ck
generator = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for n in (1, 15, 16, 17, 63, 64, 65, 196, 700):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, n, generator=generator).to(dtype)
        drawn = ck.gumbel_topk(x, n // 2, num_samples=6, seed=n)
        digest.update(drawn.indices.numpy().tobytes() + drawn.log_prob.numpy().tobytes())
print(ck._C.cpu_isa, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


def test_threads_that_flush_subnormals(backend):
    logits = torch.full((40,), 1e-40)
    wanted = ck.gumbel_topk(logits, 40, seed=2).indices
    try:
        assert torch.set_flush_denormal(True)
        assert torch.equal(ck.gumbel_topk(logits, 40, seed=2).indices, wanted)
    finally:
        torch.set_flush_denormal(False)


def test_views_that_negate_lazily(backend):
    lazy = torch.randn(6, 31, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    assert_same(ck.gumbel_topk(lazy, 4, seed=1), ck.gumbel_topk(lazy.resolve_neg(), 4, seed=1))
    drawn = torch.arange(3).expand(6, 3)
    assert torch.equal(ck.pl_log_prob(lazy, drawn), ck.pl_log_prob(lazy.resolve_neg(), drawn))


def test_the_default_device_does_not_move_results(backend):
    logits = randn(4, 10)
    with torch.device("meta"):
        sample = ck.gumbel_topk(logits, 3, num_samples=2, seed=1)
        value = ck.pl_log_prob(logits, sample.indices)
    assert_same(sample, ck.gumbel_topk(logits, 3, num_samples=2, seed=1))
    assert torch.equal(value, sample.log_prob)


def test_nothing_is_read_on_the_host():
    """On meta tensors every host read is an error, inside an op too, where no dispatch mode looks."""
    logits = torch.zeros(4, 10, device="meta", requires_grad=True)
    with ck.use_backend("reference"):
        sample = ck.gumbel_topk(logits, 3, num_samples=2, seed=1)
        assert sample.indices.shape == (2, 4, 3)
        (grad,) = torch.autograd.grad(sample.log_prob.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), logits)
    assert grad.shape == second.shape == (4, 10)


# ---- torch.compile, opcheck ---------------------------------------------------------------------


def test_opcheck():
    logits, drawn = randn(3, 7), torch.tensor([[[0, 1], [2, 6], [4, -1]]])
    torch.library.opcheck(ops._gumbel_topk.dispatch, (logits, 3, 2, -5, 1, None, 0))
    torch.library.opcheck(ops._gumbel_topk.dispatch, (logits, 3, 2, -5, 1, torch.tensor(4), 0))
    torch.library.opcheck(ops._pl_log_prob.dispatch, (logits, drawn))
    torch.library.opcheck(ops._pl_log_prob.dispatch, (logits.clone().requires_grad_(), drawn))
    torch.library.opcheck(ops._pl_log_prob.dispatch, (logits.bfloat16().requires_grad_(), drawn))
    grad = torch.ones(1, 3, requires_grad=True)
    torch.library.opcheck(ops._pl_log_prob_backward.dispatch, (grad, logits.clone().requires_grad_(), drawn))
    torch.library.opcheck(ops._pl_log_prob_double_backward.dispatch, (logits, grad.detach(), logits, drawn))


def test_compiles_whole_without_recompiling():
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def draws(logits, step):
        sample = ck.gumbel_topk(logits * 2, 3, num_samples=2, seed=2**63 + 5, step=step)
        return sample.indices + 0, sample.log_prob, sample.status, ck.pl_log_prob(logits, sample.indices)

    for rows, step in ((4, 2), (5, 3), (6, 4), (9, 5), (11, 2**31)):
        logits = randn(rows, 10 + rows)
        indices, log_prob, _, value = draws(logits, step)
        wanted = ck.gumbel_topk(logits * 2, 3, num_samples=2, seed=2**63 + 5, step=step)
        assert torch.equal(indices, wanted.indices)
        assert torch.equal(log_prob, wanted.log_prob)
        assert torch.equal(value, ck.pl_log_prob(logits, indices))
    assert compilations <= 2


def test_compiles_with_the_gradient():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(logits, drawn):
        return (ck.pl_log_prob(logits, drawn) * 2).sum()

    logits, drawn = randn(4, 9).requires_grad_(), torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    (found,) = torch.autograd.grad(loss(logits, drawn), logits)
    (wanted,) = torch.autograd.grad((ck.pl_log_prob(logits, drawn) * 2).sum(), logits)
    assert torch.equal(found, wanted)
