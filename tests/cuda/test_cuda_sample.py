"""Gumbel top-k as a CUDA kernel: the draws of the CPU engine bit for bit, log-probabilities by tolerance."""

from __future__ import annotations

import math

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels.cuda import sample
from cacovid_kernels.native import sample as engine

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT, LONG = 1024, 8192  # most items of a row that is sorted; of one whose keys are kept


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_odd(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([-INF, NAN, INF], dtype=x.dtype)[torch.randint(0, 3, x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < share, odd, x)


def check(logits: torch.Tensor, k: int, samples: int, seed: int = 5, step: int = 0, stream: int = 0) -> None:
    found = sample.gumbel_topk(logits, k, samples, seed, step, None, stream)
    expected = engine.gumbel_topk(logits, k, samples, seed, step, None, stream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 97, 196, 256, 257, 600, SHORT])
def test_rows_of_every_length(n, dtype):
    for k in {0, 1, n // 3, n - 1, n}:
        check(randn(3, n, seed=n).to(dtype), k, 2, n)


@pytest.mark.parametrize("n", [SHORT + 1, 4099, LONG, LONG + 1])
@pytest.mark.parametrize("k", [0, 1, 37, 1000])
def test_long_rows(n, k):
    """Keys in shared memory, or made again in every pass."""
    check(with_odd(randn(2, n, seed=k), 0.1, 3), k, 2)


@pytest.mark.parametrize("n", [5000, LONG + 100])
def test_more_winners_than_are_sorted_at_once(n):
    check(randn(1, n), 2049, 1)
    check(with_odd(randn(1, n), 0.3, 1), n, 1)


@pytest.mark.parametrize("n", [50, 2000])
def test_odd_logits(n):
    for dtype in DTYPES:
        for share in (0.05, 0.5, 0.99):
            check(with_odd(randn(4, n, seed=n) * 30, share, 2).to(dtype), 20, 2)
    for value in (0.0, -0.0, NAN, INF, -INF, 1e-42):
        check(torch.full((2, n), value), 7, 2)


@pytest.mark.parametrize("n", [300, 1500, 9000])
def test_ties_go_to_the_lower_index(n):
    """Where the noise is rounded away, digits of the index decide."""
    logits = torch.full((2, n), 1e30)
    logits[1, n // 2] = 2e30
    found = sample.gumbel_topk(logits, 40, 1, 5, 0, None, 0)
    assert found[0][0, 0].tolist() == list(range(40))
    assert found[0][0, 1].tolist() == [n // 2, *range(39)]
    logits = torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(0)) * 1e30
    args = logits, 250, 1, 5, 0, None, 0
    assert torch.equal(sample.gumbel_topk(*args)[0], engine.gumbel_topk(*args)[0])
    check(logits[:, :1] + torch.zeros(1, n), 250, 1)


@pytest.mark.parametrize("n", [200, 1200])
@pytest.mark.parametrize("scale", [1e-3, 50.0, 3e3, 1e6])
def test_logits_of_any_range(n, scale):
    """Sums of weights that no float64 holds."""
    check(randn(3, n, seed=1) * scale, 30, 2)
    check(randn(3, n, seed=2) * scale, n, 1)


def test_layouts():
    memory = randn(20_000)
    for logits in (
        memory[7:].as_strided((3, 20), (3, 9)),
        memory[:60].reshape(20, 3).t(),
        memory[:20].expand(2, 20),
        memory[1:].as_strided((2, 1300), (5, 13)),
    ):
        check(logits, 5, 2)


@pytest.mark.parametrize("n", [16, 1100])
def test_keys_and_steps(n):
    logits = randn(1, n)
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        check(logits, 5, 1, seed, 2**32 - 1, 239)
    for added in (2**32 - 3, -3, 2**40 - 3):
        found = sample.gumbel_topk(logits, 5, 1, 7, 10, torch.tensor(added), 1)
        assert torch.equal(found[0], engine.gumbel_topk(logits, 5, 1, 7, 7, None, 1)[0])


def test_launches_may_need_more_shared_memory_than_others():
    """More than 48 KiB has to be asked for; the emulated machine refuses to change what was asked for."""
    for n in (5000, 8000, 6000):
        check(randn(1, n), 2048, 1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("samples", [0, 2])
def test_empty(shape, samples):
    check(torch.zeros(shape), 0, samples)


def test_no_samples_have_a_status():
    check(with_odd(randn(3, 20), 0.2, 1), 20, 0)
    check(with_odd(randn(2, 5000), 0.2, 1), 5000, 0)


def test_the_public_op():
    with ck.use_backend("cpu"):
        expected = ck.gumbel_topk(randn(2, 3, 40), 4, num_samples=3, seed=1)
    assert torch.equal(ck.gumbel_topk(randn(2, 3, 40), 4, num_samples=3, seed=1).indices, expected.indices)
