"""Exact arithmetic and randomness inside kernels: the same bits as the reference."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from cacovid_kernels.reference import exact, random
from cacovid_kernels.triton import exact as kernel_exact
from cacovid_kernels.triton import noise
from cacovid_kernels.triton.launch import double_bits, launch

exp_exact, order_key, to_fixed, from_fixed = (
    kernel_exact.exp_exact, kernel_exact.order_key, kernel_exact.to_fixed, kernel_exact.from_fixed,
)  # fmt: skip
double_of, rank_word, word_index, word_key = (
    kernel_exact.double_of, kernel_exact.rank_word, kernel_exact.word_index, kernel_exact.word_key,
)  # fmt: skip
random_bits, gumbel_noise, ln_float, exp_float = (
    noise.random_bits, noise.gumbel_noise, noise.ln_float, noise.exp_float,
)  # fmt: skip
N = 2048


def scores() -> torch.Tensor:
    x = torch.randn(N) * torch.tensor([1e-3, 1.0, 30.0, 1000.0]).repeat(N // 4)
    odd = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, -math.nan]
    x[: len(odd)] = torch.tensor(odd)
    return x


@triton.jit
def exact_kernel(x, scale, exp_out, key_out, fixed_out, word_out, N: tl.constexpr):
    i = tl.arange(0, N)
    score = tl.load(x + i)
    e = exp_exact(-tl.abs(score.to(tl.float64)))
    tl.store(exp_out + i, e)
    tl.store(fixed_out + i, from_fixed(to_fixed(e * double_of(scale))))
    key = order_key(score)
    word = rank_word(key, i)
    tl.store(key_out + i, key.to(tl.int64))
    tl.store(word_out + i, tl.where((word_index(word) == i) & (word_key(word) == key.to(tl.int64)), word, 0))


def test_exact_arithmetic():
    x = scores()
    exp_out, fixed_out = (torch.empty(N, dtype=torch.float64) for _ in range(2))
    key_out, word_out = (torch.empty(N, dtype=torch.int64) for _ in range(2))
    launch(exact_kernel, (1,), x, double_bits(1 / 3), exp_out, key_out, fixed_out, word_out, N=N)
    e = exact.exp_exact(-x.double().abs())
    assert torch.equal(exp_out, e)
    assert torch.equal(fixed_out, exact.from_fixed(exact.to_fixed(e * (1 / 3))))
    assert torch.equal(key_out, exact.order_key(x))
    assert torch.equal(word_out.sort(descending=True).indices, exact.ranking(x))


@triton.jit
def noise_kernel(column, row, sample, x, seed, step, stream, bits_out, noise_out, exp_out, ln_out, N: tl.constexpr):
    i = tl.arange(0, N)
    bits = random_bits(tl.load(column + i), tl.load(row + i), tl.load(sample + i), seed, step, stream)
    tl.store(bits_out + i, bits.to(tl.int64))
    tl.store(noise_out + i, gumbel_noise(bits))
    score = tl.load(x + i)
    tl.store(exp_out + i, exp_float(-tl.abs(score)))
    tl.store(ln_out + i, ln_float(tl.abs(score) + 1e-30))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789123])
def test_randomness(seed):
    column, row = torch.arange(N) * 977, torch.arange(N) % 5
    sample, x = torch.arange(N) % 2**24, scores().nan_to_num(0.5, 3e38, -3e38)
    bits_out = torch.empty(N, dtype=torch.int64)
    noise_out, exp_out, ln_out = (torch.empty(N) for _ in range(3))
    args = (column, row, sample, x, seed, 2**32 - 1, 253, bits_out, noise_out, exp_out, ln_out)
    launch(noise_kernel, (1,), *args, N=N)
    bits = random.random_bits(column, row, sample, seed, 2**32 - 1, 253)
    assert torch.equal(bits_out, bits)
    assert torch.equal(noise_out, random.gumbel_noise(bits))
    assert torch.equal(exp_out, random.exp_float(-x.abs()))
    assert torch.equal(ln_out, random.ln_float(x.abs() + 1e-30))
