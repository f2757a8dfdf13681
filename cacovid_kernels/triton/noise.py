"""The library's randomness: the Triton twin of `csrc/include/cacovid/philox.h` and `gumbel.h`, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def step_of(step, added_steps):
    """The step that counts, int64 of which 32 bits do; `added_steps` points to one int64 or is None."""
    if added_steps is not None:
        step += tl.load(added_steps)
    return step


@triton.jit
def random_bits(column, row, sample, seed, step, stream):
    """uint32, 32 random bits of every element; column, row and sample have one shape, the others are scalars."""
    zero = tl.zeros_like(column).to(tl.uint32)
    last = sample.to(tl.uint32) | (zero + (tl.cast(stream, tl.uint32) << 24))
    word, _, _, _ = tl.philox(seed, column.to(tl.uint32), row.to(tl.uint32), zero + tl.cast(step, tl.uint32), last)
    return word


@triton.jit
def _ln_1p_core(f):
    p = tl.fma(tl.full(f.shape, 0.13820920884609222, tl.float32), f, -0.15122200548648834)
    p = tl.fma(p, f, 0.140421524643898)
    p = tl.fma(p, f, -0.1647232323884964)
    p = tl.fma(p, f, 0.2000793069601059)
    p = tl.fma(p, f, -0.2500423789024353)
    p = tl.fma(p, f, 0.3333326578140259)
    p = tl.fma(p, f, -0.5)
    return tl.fma(p, f * f, f)


@triton.jit
def _split_exponent(x):
    """x = mantissa * 2^exponent with the mantissa in [2/3, 4/3), for positive normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def ln_float(x):
    """ln(x) of positive normal float32 values."""
    exponent, mantissa = _split_exponent(x)
    return tl.fma(exponent.to(tl.float32), 0.69314718056, _ln_1p_core(mantissa - 1.0))


@triton.jit
def exp_float(x):
    """e^x of float32 values <= 0; 0 below -87 and for NaN."""
    tiny = (x >= -87.0) == 0
    x = tl.where(tiny, 0.0, x)
    shifted = tl.fma(x, 1.44269504, 12582912.0)  # 1.5 * 2^23: the integer part of x / ln 2 is in the low bits
    n = shifted - 12582912.0
    r = tl.fma(n, -3.194618329871446e-05, tl.fma(n, -0.693115234375, x))
    q = tl.fma(tl.full(r.shape, 0.001382146612741053, tl.float32), r, 0.008368662558495998)
    q = tl.fma(q, r, 0.041668254882097244)
    q = tl.fma(q, r, 0.1666652113199234)
    q = tl.fma(q, r, 0.4999999403953552)
    p = tl.fma(q, r * r, r) + 1.0
    n_bits = shifted.to(tl.int32, bitcast=True) - 0x4B400000  # n itself: the shift by 23 must not overflow
    scaled = (p.to(tl.int32, bitcast=True) + (n_bits << 23)).to(tl.float32, bitcast=True)
    return tl.where(tiny, 0.0, scaled)


@triton.jit
def gumbel_noise(bits):
    """Standard Gumbel noise, float32, of uint32 random bits; falls as the bits rise."""
    bits = tl.where(bits < 0xFFFFFEFF, bits, 0xFFFFFEFF)  # the last 256 would round v to 1
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponent, mantissa = _split_exponent(1.0 - v)
    f = tl.where(exponent == 0, -v, mantissa - 1.0)
    return -ln_float(-tl.fma(exponent.to(tl.float32), 0.69314718056, _ln_1p_core(f)))
