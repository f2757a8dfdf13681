"""Arithmetic with one answer on every backend: the Triton twin of `csrc/include/cacovid/exact.h` and `order.h`.

Every kernel that uses it is launched without contraction of products and sums (`launch.launch`).
"""

import triton
import triton.language as tl


@triton.jit
def double_of(bits):
    """The float64 that an integer argument carries (`launch.double_bits`)."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)


@triton.jit
def round_even(x):
    """The nearest integer, ties to even, of float64 below 2^51; float64."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def to_fixed(x):
    """float64 to int64 with 40 fractional bits: sums have the same bits in every order."""
    return round_even(x * 1099511627776.0).to(tl.int64)


@triton.jit
def from_fixed(x):
    """The float64 that a fixed-point integer stands for."""
    return x.to(tl.float64) * 9.094947017729282379150390625e-13


@triton.jit
def exp_exact(x):
    """e^x for float64 x <= 0; 0 below -700 and for NaN."""
    tiny = (x >= -700.0) == 0
    x = tl.where(tiny, 0.0, x)
    n = round_even(x * 1.4426950408889634)
    r = x - n * 0.693147180369123816490
    r = r - n * 1.90821492927058770002e-10
    p = tl.full(x.shape, 1.6059043836821613e-10, tl.float64)
    p = p * r + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 1.984126984126984e-04
    p = p * r + 1.3888888888888889e-03
    p = p * r + 8.333333333333333e-03
    p = p * r + 4.1666666666666664e-02
    p = p * r + 1.6666666666666666e-01
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(tiny, 0.0, p * scale)


@triton.jit
def order_key(scores):
    """uint32, larger = ranked earlier: finite by value (-0 = +0), then -inf, then every NaN as 0."""
    bits = scores.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0, key)


@triton.jit
def rank_word(key, index):
    """int64 of an order key and a position below 2^32: a larger one ranks earlier, ties go to the lower position."""
    return ((key.to(tl.int64) - 0x80000000) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def word_index(word):
    """The position in a rank word, int64."""
    return 0xFFFFFFFF - (word & 0xFFFFFFFF)


@triton.jit
def word_key(word):
    """The order key in a rank word, int64 in [0, 2^32)."""
    return (word >> 32) + 0x80000000
