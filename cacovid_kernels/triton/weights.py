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


@triton.jit
def last_lane(values, lane, BLOCK: tl.constexpr):
    """The last lane of a float64 block."""
    return tl.sum(tl.where(lane == BLOCK - 1, values, 0.0), 0)


@triton.jit
def race_back(
    logits, indices, direction, exponents, totals, means, n, k, logit_stride, draw_stride, last_exponent, last_total,
    last_moment, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One ordered draw of k from a row of n logits, from the last stage to the first.

    `last_*` is the weight of who is never drawn. Writes the weight of the race at every stage (ORDER > 0) and the mean
    of the direction over it (ORDER > 1). Returns the log-probability, its slope along the direction, how many indices
    are inside the row; and 1 if a stage is impossible, 2 if one is undefined.
    """
    lane = tl.arange(0, BLOCK)
    value, slope = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    wrong, inside = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    for after in range(0, k, BLOCK):
        j = k - 1 - after - lane
        index = tl.load(indices + j * draw_stride, mask=j >= 0, other=-1)
        exists = (index >= 0) & (index < n)
        x = load_double(logits + index * logit_stride, exists)
        logit = tl.where(x == x, x, float("-inf"))
        part_exponent, part = weight_of(logit)
        if ORDER > 1:
            towards = tl.load(direction + index, mask=exists, other=0.0)
            exponent, total, moment = tl.associative_scan((part_exponent, part, part * towards), 0, add_moments)
            exponent, total, moment = add_moments(last_exponent, last_total, last_moment, exponent, total, moment)
            last_moment = last_lane(moment, lane, BLOCK)
        else:
            exponent, total = tl.associative_scan((part_exponent, part), 0, add_weights)
            exponent, total = add_weights(last_exponent, last_total, exponent, total)
        last_exponent, last_total = last_lane(exponent, lane, BLOCK), last_lane(total, lane, BLOCK)
        # -1 is padding, -inf is never drawn, +inf wins for sure.
        chance = tl.abs(logit) < float("inf")
        value += tl.where(chance, log_share(part_exponent, part, exponent, total), 0.0)
        undefined = ((index != -1) & (exists == 0)) | (x != x)
        wrong |= tl.where(undefined, 2, tl.where(exists & (logit == float("-inf")), 1, 0))
        inside += exists.to(tl.float64)
        if ORDER > 0:
            tl.store(exponents + j, exponent, mask=j >= 0)
            tl.store(totals + j, total, mask=j >= 0)
        if ORDER > 1:
            mean = moment / tl.where(total > 0.0, total, 1.0)
            tl.store(means + j, mean, mask=j >= 0)
            slope += tl.where(chance & (exponent < CERTAIN), towards - mean, 0.0)
    return tl.sum(value, 0), tl.sum(slope, 0), tl.sum(inside, 0), tl.max(wrong, 0)
