"""Philox and the Gumbel transform: published words, the engine's bits against the reference's, accuracy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import check_every_instruction_set
from hypothesis import given, settings
from hypothesis import strategies as st

import cacovid_kernels as ck
from cacovid_kernels.reference import random as reference

CHUNK = 2**15  # a chunk's intermediate results stay in the cache
CHECKSUM = 0x997650306F623B57  # of the noise of all 2^32 inputs, from the emulated fma


def engine_noise(bits: torch.Tensor) -> torch.Tensor:
    noise = torch.empty(bits.shape, dtype=torch.float32)
    ck._C.gumbel_noise(torch.where(bits < 2**31, bits, bits - 2**32).int(), noise)
    return noise


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


# The known answers that Random123 publishes for Philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, seed, expected):
    assert [int(w) for w in reference.philox(words(*counter), seed)] == list(expected)


def test_minus_one_is_the_largest_seed():
    counter = words(1, 2, 3, 4)
    assert reference.philox(counter, -1) == reference.philox(counter, 2**64 - 1)


def test_bits_depend_on_every_part_of_the_name():
    names = [(c, r, s, seed, step, stream) for c in (0, 1) for r in (0, 1) for s in (0, 1)
             for seed in (0, 1, 2**32) for step in (0, 1) for stream in (0, 1)]  # fmt: skip
    found = set()
    for c, r, s, seed, step, stream in names:
        found.add(int(reference.random_bits(*words(c, r, s), seed, step, stream)))
    assert len(found) == len(names)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@settings(max_examples=500)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = np.float32(reference.fma(torch.tensor(a), torch.tensor(b), torch.tensor(c)).item())
    distance = abs(Fraction(float(found)) - exact)
    for neighbour in (np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))):
        assert distance <= abs(Fraction(float(neighbour)) - exact)


def test_engine_equals_reference_over_2_to_the_23_inputs():
    different = 0
    for first in range(0, 2**23, CHUNK):
        bits = torch.arange(first, first + CHUNK) * 512 + torch.arange(CHUNK) % 512
        noise = engine_noise(bits).view(torch.int32)
        different += int((noise != reference.gumbel_noise(bits).view(torch.int32)).sum())
    assert different == 0


@pytest.mark.parametrize("first", [0, 2**24 - 2**15, 2**31 - 2**15, 2**32 // 3 - 2**15, 2**32 - 2**16])
def test_engine_equals_reference_where_the_formula_changes(first):
    bits = torch.arange(first, first + 2**16)
    noise = engine_noise(bits)
    assert torch.equal(noise, reference.gumbel_noise(bits))
    assert torch.isfinite(noise).all()
    assert (noise.diff() <= 0).all()


def test_noise_is_accurate():
    bits = torch.cat([torch.arange(2**16), torch.randint(0, 2**32, (2**18,)), 2**32 - 1 - torch.arange(2**16)])
    v = (bits.clamp(max=0xFFFFFEFF).float() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-v.double()))
    assert (engine_noise(bits).double() - exact).abs().max() < 1.02e-6
    assert engine_noise(torch.tensor([0, 2**32 - 1])).tolist() == pytest.approx([22.8739, -2.8116], abs=1e-4)


def test_rounding_of_the_uniform_number_shifts_only_noises_that_lose():
    def error(bits: torch.Tensor) -> float:
        exact = -torch.log(-torch.log1p(-(bits.double() + 0.5) * 2.0**-32))
        return (engine_noise(bits).double() - exact).abs().max().item()

    winners = torch.randint(0, 2**31, (2**20,))  # the larger half of all noises
    assert error(torch.cat([winners, torch.arange(2**16)])) < 1.1e-6
    last = 2**32 - 1 - torch.arange(2**20)
    assert 0.02 < error(last[256:]) < 0.025
    assert 0.3 < error(last) < 0.32


def test_ln_and_exp_are_accurate():
    generator = torch.Generator().manual_seed(0)
    first, last = torch.tensor([1.25, 1.4]).view(torch.int32).tolist()  # the relative error is largest at 1.3336
    near = torch.arange(first, last, dtype=torch.int32).view(torch.float32)
    far = torch.exp(torch.rand(2**16, generator=generator) * 160 - 80)
    x = torch.cat([torch.rand(2**16, generator=generator) * 4, far, near]).clamp(min=1e-37)
    error = (reference.ln_float(x).double() - x.double().log()).abs()
    assert (error <= 1.3e-7 * x.double().log().abs()).all()
    y = -torch.rand(2**17, generator=generator) * 86.9
    assert (reference.exp_float(y).double() / y.double().exp() - 1).abs().max() < 1e-7
    assert reference.exp_float(torch.tensor([0.0, -87.5, -math.inf, math.nan])).tolist() == [1.0, 0.0, 0.0, 0.0]


ISA_SCRIPT = """
import torch, cacovid_kernels as ck
bits = torch.arange(2**18) * 16384 + torch.arange(2**18) % 16384
noise = torch.empty(2**18)
ck._C.gumbel_noise(torch.where(bits < 2**31, bits, bits - 2**32).int(), noise)
print(ck._C.cpu_isa, int((noise.view(torch.int32).long() * (2 * bits + 1)).sum()))
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


@pytest.mark.nightly
def test_all_inputs():
    """All 2^32 inputs: finite, never rising, and the bits that the emulated fma gives (csrc/tests/test_gumbel.cpp)."""
    step, last, checksum = 2**22, math.inf, 0
    for first in range(0, 2**32, step):
        bits = torch.arange(first, first + step)
        noise = engine_noise(bits)
        assert torch.isfinite(noise).all()
        assert noise[0] <= last
        assert (noise.diff() <= 0).all()
        last = noise[-1]
        checksum += int(((noise.view(torch.int32).long() & 0xFFFFFFFF) * (2 * bits + 1)).sum())
    assert checksum % 2**64 == CHECKSUM
