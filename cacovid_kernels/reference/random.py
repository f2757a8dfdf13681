"""The library's randomness: the torch twin of `csrc/include/cacovid/philox.h` and `gumbel.h`, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_RESERVED_STREAM = 240
STREAM_FRAMES, STREAM_GROUPS, STREAM_TOKENS = 253, 254, 255

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LN_1P = (
    -0.15122200548648834,
    0.140421524643898,
    -0.1647232323884964,
    0.2000793069601059,
    -0.2500423789024353,
    0.3333326578140259,
    -0.5,
)

_EXP = (0.008368662558495998, 0.041668254882097244, 0.1666652113199234, 0.4999999403953552)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10: four counter words, int64 in [0, 2^32), and a 64-bit seed to four random words."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps: the same 64 bits
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _WORD, high0 ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def step_of(step: int, added_steps: Tensor | None) -> int | Tensor:
    """The step that counts, in [0, 2^32); a tensor stays on its device."""
    return step if added_steps is None else (step + added_steps) & _WORD


def random_bits(column: Tensor, row: Tensor, sample: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """32 random bits, int64 in [0, 2^32), of every element of the broadcast shape of its three names."""
    column, row, sample = torch.broadcast_tensors(column.long(), row.long(), sample.long())
    return philox([column, row, torch.zeros_like(column) + step, sample | stream << 24], seed)[0]


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 values, rounded once: the float64 sum is rounded to odd, then to float32."""

    def as_double(x: Tensor | float) -> Tensor:  # by a fill: a copy from the host would wait for the device
        return (a.new_full((), x) if isinstance(x, float) else x).double()

    product, addend = a.double() * as_double(b), as_double(c)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    to_odd = torch.where((error > 0) == (total > 0), 1, -1)
    bits = torch.where((error != 0) & (bits & 1 == 0), bits + to_odd, bits)
    return bits.view(torch.float64).float()


def _ln_1p_core(f: Tensor) -> Tensor:
    p = torch.full_like(f, 0.13820920884609222)
    for coefficient in _LN_1P:
        p = fma(p, f, coefficient)
    return fma(p, f * f, f)


def _split_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = mantissa * 2^exponent with the mantissa in [2/3, 4/3)."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - 0x3F2AAAAB) >> 23
    return exponent, (bits - (exponent << 23)).view(torch.float32)


def ln_float(x: Tensor) -> Tensor:
    """ln(x) of positive normal float32 values, relative error below 1.3e-7."""
    exponent, mantissa = _split_exponent(x)
    return fma(exponent.float(), 0.69314718056, _ln_1p_core(mantissa - 1.0))


def exp_float(x: Tensor) -> Tensor:
    """e^x of float32 values <= 0, relative error below 1e-7; 0 below -87 and for NaN."""
    tiny = ~(x >= -87.0)
    x = torch.where(tiny, 0.0, x)
    shifted = fma(x, 1.44269504, 12582912.0)  # 1.5 * 2^23: the integer part of x / ln 2 is in the low bits
    n = shifted - 12582912.0
    r = fma(n, -3.194618329871446e-05, fma(n, -0.693115234375, x))
    q = torch.full_like(r, 0.001382146612741053)
    for coefficient in _EXP:
        q = fma(q, r, coefficient)
    p = fma(q, r * r, r) + 1.0
    scaled = (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return torch.where(tiny, 0.0, scaled)


def gumbel_noise(bits: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of random bits (int64 in [0, 2^32)); falls as the bits rise."""
    bits = bits.clamp(max=0xFFFFFEFF)  # the last 256 would round v to 1
    v = (bits.float() + 0.5) * 2.0**-32
    exponent, mantissa = _split_exponent(1.0 - v)
    f = torch.where(exponent == 0, -v, mantissa - 1.0)
    return -ln_float(-fma(exponent.float(), 0.69314718056, _ln_1p_core(f)))
