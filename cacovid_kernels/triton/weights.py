"""Weights e^logit of any range: pairs that stand for total * 16^exponent, both float64, the exponent integral.

A logit costs one exponential and a sum of weights none. No sum overflows, and none subtracts.
"""

import triton
import triton.language as tl

CERTAIN = tl.constexpr(1.7976931348623157e308)  # exponent of a logit of +inf, above those of all finite ones
NOBODY = tl.constexpr(-1.7976931348623157e308)  # exponent of no weight: a number, so that differences are numbers
LOG_16 = tl.constexpr(2.772588722239781)


@triton.jit
def load_double(pointers, mask):
    """float64 logits, -inf where masked."""
    x = tl.load(pointers, mask=mask, other=float("-inf"))
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def weight_of(logit):
    """e^logit of float64 logits that are not NaN."""
    finite = tl.abs(logit) < float("inf")
    x = tl.where(finite, logit, 0.0)
    exponent = tl.floor(x * 0.36067376022224085 + 0.5)
    rest = tl.fma(exponent, tl.full(x.shape, -2.772588721476495, tl.float64), x)
    rest = tl.fma(exponent, tl.full(x.shape, -7.632857168310801e-10, tl.float64), rest)
    rest = tl.where(tl.abs(rest) < 2.0, rest, 0.0)  # logits above 2^50 have no finer digits
    exponent = tl.where(finite, exponent, tl.where(logit > 0.0, CERTAIN, NOBODY))
    return exponent, tl.where(exponent > NOBODY, tl.exp(rest), 0.0)


@triton.jit
def power(exponent):
    """16^exponent for exponents <= 0; 2^-1020 of all that are less."""
    return ((1023 + 4 * tl.maximum(exponent, -255.0).to(tl.int64)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _powers(exponent_a, exponent_b):
    """What two totals are multiplied by to have the larger exponent."""
    less = power(-tl.abs(exponent_a - exponent_b))
    return tl.where(exponent_a < exponent_b, less, 1.0), tl.where(exponent_a < exponent_b, 1.0, less)


@triton.jit
def add_weights(exponent_a, total_a, exponent_b, total_b):
    power_a, power_b = _powers(exponent_a, exponent_b)
    return tl.maximum(exponent_a, exponent_b), total_a * power_a + total_b * power_b


@triton.jit
def add_moments(exponent_a, total_a, moment_a, exponent_b, total_b, moment_b):
    """The same with sums of weight times direction, which have the exponent of the weight."""
    power_a, power_b = _powers(exponent_a, exponent_b)
    total, moment = total_a * power_a + total_b * power_b, moment_a * power_a + moment_b * power_b
    return tl.maximum(exponent_a, exponent_b), total, moment


@triton.jit
def aligned(exponent, total):
    """A block of weights as the largest exponent, scalar, and totals that refer to it."""
    largest = tl.max(exponent, 0)
    return largest, total * power(exponent - largest)


@triton.jit
def log_share(part_exponent, part, exponent, total):
    """ln of a part of a weight; -inf of no part, and of a finite part of an infinite weight."""
    some = (part > 0.0) & (total > 0.0)
    digits = tl.log(tl.where(some, part / tl.where(some, total, 1.0), 1.0))
    return tl.where(some, (part_exponent - exponent) * LOG_16 + digits, float("-inf"))


@triton.jit
def share(part_exponent, part, exponent, total):
    """A part of a weight; 0 where the weight is infinite or none."""
    some = (total > 0.0) & (exponent < CERTAIN)
    return tl.where(some, part / tl.where(some, total, 1.0) * power(part_exponent - exponent), 0.0)
