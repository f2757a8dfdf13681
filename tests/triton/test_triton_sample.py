"""gumbel_topk and the probability of draws: the engine's draws bit for bit, its log-probabilities and derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.native import sample as engine
from cacovid_kernels.triton import plackett_luce, radix, sample, topk

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of infinite exponents


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_odd(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([-INF, NAN, INF], dtype=x.dtype)[torch.randint(0, 3, x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < share, odd, x)


def check(logits: torch.Tensor, k: int, samples: int, seed: int = 5, step: int = 0, stream: int = 0) -> None:
    """Compares draws, status and log-probabilities with the engine's."""
    found = sample.gumbel_topk(logits, k, samples, seed, step, None, stream)
    expected = engine.gumbel_topk(logits, k, samples, seed, step, None, stream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)


# ---- gumbel_topk --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(dtype):
    for n, k in ((1, 1), (15, 4), (17, 17), (33, 0)):
        check(randn(2, n, seed=n).to(dtype), k, 1, n)
    check(randn(1, 196).to(dtype), 50, 2 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_logits(dtype):
    check(with_odd(randn(2, 14, seed=1) * 30, 0.4, 2).to(dtype), 9, 1)
    logits = torch.zeros(4, 6, dtype=dtype)
    logits[0, [1, 4]] = INF
    logits[1, :5] = -INF
    logits[2] = NAN
    logits[3] = torch.tensor([-INF, NAN, INF, 6e4, -6e4, 1e-7], dtype=dtype)
    check(logits, 4, 1)
    drawn = ck.gumbel_topk(logits, 4, num_samples=1, seed=5)
    assert drawn.indices[0, 0, :2].tolist() == [1, 4]
    assert drawn.indices[0, 1:3].tolist() == [[5, -1, -1, -1], [-1] * 4]
    assert drawn.status.tolist() == [2, 4, 5, 3]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("samples", [0, 2])
def test_empty(shape, samples):
    check(torch.zeros(shape), 0, samples)


def test_no_samples_have_a_status():
    check(with_odd(randn(3, 20), 0.2, 1), 20, 0)
    check(with_odd(randn(2, 5000), 0.2, 1), 5000, 0)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_keys(seed):
    check(randn(2, 16), 5, 1, seed, 2**32 - 1, 239)


@pytest.mark.parametrize("n", [16, 4097])
def test_a_step_on_the_device(n):
    """Counted modulo 2^32, together with the one that the host knows."""
    logits, added = randn(1, n), torch.tensor(2**32 - 3)
    found = sample.gumbel_topk(logits, 5, 1, 7, 10, added, 1)
    expected = engine.gumbel_topk(logits, 5, 1, 7, 7, None, 1)
    assert torch.equal(found[0], expected[0])


def test_any_stride():
    memory = randn(500)
    check(memory[7:].as_strided((3, 20), (3, 9)), 5, 1)
    check(memory[:60].reshape(20, 3).t(), 5, 1)
    check(memory[:20].expand(2, 20), 5, 2)


def test_ties_go_to_the_lower_index():
    logits = torch.full((2, 30), 1e30)  # the noise is rounded away
    logits[1, 5] = 2e30
    assert ck.gumbel_topk(logits, 4, seed=0).indices.tolist() == [[0, 1, 2, 3], [5, 0, 1, 2]]
    draws, log_prob, _ = sample.gumbel_topk(logits[:, :16], 16, 1, 5, 0, None, 0)
    assert torch.equal(draws, engine.gumbel_topk(logits[:, :16], 16, 1, 5, 0, None, 0)[0])
    # Of weights so large, too, the factor of equal ones counts.
    torch.testing.assert_close(log_prob[0], torch.tensor([-math.lgamma(17), -math.lgamma(16)]))
    check(randn(2, 16) * 1e30, 12, 1)


@pytest.mark.parametrize("k", [0, 1, 230])
def test_long_rows(k, monkeypatch):
    monkeypatch.setattr(plackett_luce, "DRAWS", 16)
    monkeypatch.setattr(sample, "SCRATCH", 3 * 4 * 5003)  # three draws at a time
    logits = with_odd(randn(2, 5003), 0.1, 3)
    logits[1, 200:] = -INF
    check(logits, k, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_every_dtype(dtype):
    check(randn(1, 10_007).to(dtype), 25, 1, 11)


# ---- the probability of draws -------------------------------------------------------------------


def check_draws(logits: torch.Tensor, drawn: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Compares values and both derivatives with the engine's."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    grad = torch.linspace(0.5, 1, drawn.shape[0] * drawn.shape[1], dtype=dtype).reshape(drawn.shape[:2])
    direction = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape).to(logits.dtype)

    def run(backend):
        return (
            backend.pl_log_prob(logits, drawn),
            backend.pl_log_prob_backward(grad, logits, drawn),
            *backend.pl_log_prob_double_backward(direction, grad, logits, drawn),
        )

    for found, expected in zip(run(sample), run(engine), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("scale", "odd"), [(1.0, 0.1), (50.0, 0.0), (3000.0, 0.1), (1e12, 0.0)])
def test_derivatives(scale, odd, monkeypatch):
    monkeypatch.setattr(plackett_luce, "MOST", 16)  # several chunks and blocks of stages
    monkeypatch.setattr(plackett_luce, "DRAWS", 16)
    generator = torch.Generator().manual_seed(int(scale))
    for rows, n, k, samples in ((1, 40, 37, 1), (2, 23, 6, 2), (1, 8, 8, 1)):
        logits = with_odd(randn(rows, n, seed=n, dtype=torch.float64) * scale, odd, n)
        drawn = torch.rand(samples, rows, n, generator=generator).argsort(-1)[..., :k]
        if odd:
            other = torch.randint(-2, n + 2, drawn.shape, generator=generator)
            drawn = torch.where(torch.rand(drawn.shape, generator=generator) < odd / 2, other, drawn)
        check_draws(logits, drawn)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_dtypes_and_strides(dtype, tolerance):
    logits = randn(12, 6).to(dtype).t()[::2]
    drawn = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)])
    check_draws(logits, drawn.reshape(3, 2, 5).transpose(0, 1), tolerance)


def test_infinite_logits():
    logits = torch.tensor([[INF, 0.0, INF, 1.0, -INF]], dtype=torch.float64)
    orders = [[0, 2, 3], [2, 0, 1], [0, 1, 2], [0, 2, -1], [0, -1, 2], [-1, -1, -1], [3, 4, 1], [0, 3, 1]]
    check_draws(logits, torch.tensor(orders)[:, None])


def test_odd_draws():
    logits = torch.tensor([[0.0, 1.0, -INF, NAN, 2.0]], dtype=torch.float64)
    orders = [
        [0, 1, -1], [-1, 0, 1], [0, 2, -1], [0, 0, -1], [3, 0, -1], [0, 5, 1], [0, -2, 1], [0, 2**62, -1],
        [-1, -1, -1], [0, 0, 5], [4, 1, 0],
    ]  # fmt: skip
    check_draws(logits, torch.tensor(orders)[:, None])
    found = ck.pl_log_prob(logits[0], torch.tensor(orders))
    assert found[2:4].tolist() == [-INF, -INF]
    assert torch.isnan(found[4:8]).all()
    assert found[8] == 0


def test_nothing_cancels():
    """The part that was not drawn may be as small as it likes, and exponents as far apart."""
    logits = torch.tensor([[0.0, -40.0, -80.0, -1e300, 1e-300]], dtype=torch.float64)
    found = sample.pl_log_prob(logits, torch.tensor([[[4, 0, 1]], [[2, 1, 0]], [[4, 0, 3]]]))[:, 0]
    assert found[0].item() == pytest.approx(-math.log(2) - 1.5 * math.exp(-40), rel=1e-15)
    assert found[1].item() == pytest.approx(-120 - 3 * math.log(2), rel=1e-14)
    assert found[2].item() == pytest.approx(-1e300, rel=1e-14)
    close = torch.tensor([[0.0, -30.0]], dtype=torch.float64)
    assert sample.pl_log_prob(close, torch.tensor([[[0]]])).item() == pytest.approx(-math.exp(-30), rel=1e-2)


def test_slices_of_samples(monkeypatch):
    logits, drawn = randn(1, 10, dtype=torch.float64), torch.rand(3, 1, 10).argsort(-1)[..., :4]
    monkeypatch.setattr(plackett_luce, "SCRATCH", 2 * (4 * 10 + 40 * 5))  # two samples at a time
    check_draws(logits, drawn)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_draws(shape):
    check_draws(randn(shape[1], 5, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64))
    check_draws(torch.zeros(shape[1], 0, dtype=torch.float64), torch.zeros(*shape[:2], 0, dtype=torch.int64))


def test_gradcheck():
    leaf, drawn = torch.tensor([[-900.0, 300.0, 299.0]], dtype=torch.float64).requires_grad_(), torch.tensor([[[1, 2]]])
    assert torch.autograd.gradcheck(lambda x: ck.pl_log_prob(x, drawn), (leaf,))
    leaf, drawn = randn(1, 3, dtype=torch.float64).requires_grad_(), torch.tensor([[[2, -1, 0]]])
    assert torch.autograd.gradgradcheck(lambda x: ck.pl_log_prob(x, drawn), (leaf,))


def test_log_prob_carries_the_gradient():
    logits = randn(2, 8).requires_grad_()
    drawn = ck.gumbel_topk(logits, 3, num_samples=2, seed=1)
    (found,) = torch.autograd.grad(drawn.log_prob.sum(), logits)
    with ck.use_backend("cpu"):
        (expected,) = torch.autograd.grad(ck.pl_log_prob(logits, drawn.indices).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_probabilities_of_all_draws_sum_to_one():
    draws = torch.tensor(list(itertools.permutations(range(4), 2)))
    total = ck.pl_log_prob(randn(4, dtype=torch.float64) * 2, draws).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-14)


# ---- how it is launched -------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        assert not masks, name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    for module in (sample, plackett_luce, topk, radix):

        def counted(kernel, *args, launch=module.launch, **options):
            names.append(kernel.fn.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


def test_launches_and_no_host_reads(launches):
    logits, drawn, grad = randn(1, 9), torch.zeros(2, 1, 2, dtype=torch.int64), torch.ones(2, 1)
    step = torch.ones((), dtype=torch.int64)
    with NoHostReads():
        sample.gumbel_topk(logits, 2, 2, 1, 2, step, 3)
        assert launches == ["_race_kernel"]
        launches.clear()
        sample.pl_log_prob(logits, drawn)
        assert launches == ["_stage_kernel", "_undrawn_kernel", "_draws_kernel"]
        launches.clear()
        sample.pl_log_prob_backward(grad, logits, drawn)
        sample.pl_log_prob_double_backward(logits, grad, logits, drawn)
        assert launches == ["_stage_kernel", "_undrawn_kernel", "_draws_kernel", "_gradient_kernel"] * 2
        launches.clear()
        sample.gumbel_topk(randn(1, 4097), 2, 1, 1, 2, None, 3)
    assert launches[:3] == ["_keys_kernel", "_histogram_kernel", "_histogram_kernel"]
    assert len(launches) == 10
