"""Uniformly spaced picks among the tokens of a video that were not chosen by score: the twin of `UniformFill` in
`csrc/include/cacovid/budget.h`. `BudgetPlan.picks` makes the arguments that all of it takes.
"""

import triton
import triton.language as tl

from cacovid_kernels.triton.exact import double_of, round_even


@triton.jit
def fill_position(j, count, last, step, FLOAT_RANKS: tl.constexpr):
    """Number of pick j among the unranked tokens 0 ... last, int64; strictly increasing for j in [0, count)."""
    step = double_of(step)
    if FLOAT_RANKS:
        up = step.to(tl.float32) * j.to(tl.float32)
        # One rounding, like the fused multiply-add that torch's vectorised code has here; exact as float64.
        down = tl.cast(last, tl.float64) - step * (count - 1 - j).to(tl.float64)
        x = tl.where(j < count // 2, up, down.to(tl.float32))
        return round_even(x.to(tl.float64)).to(tl.int64)
    else:
        # j * last / gaps, half to even: the product is off by less than 1 from the quotient, the remainder is exact.
        gaps = tl.maximum(tl.cast(count, tl.int64) - 1, 1)
        quotient = round_even(j.to(tl.float64) * step).to(tl.int64)
        twice, odd = 2 * (j.to(tl.int64) * last - quotient * gaps), (quotient & 1) == 1
        raised = (twice > gaps) | ((twice == gaps) & odd)
        lowered = (twice < -gaps) | ((twice == -gaps) & odd)
        return quotient + raised.to(tl.int64) - lowered.to(tl.int64)


@triton.jit
def fill_below(bound, count, last, step, picks_per_token, FLOAT_RANKS: tl.constexpr):
    """How many picks lie before unranked token `bound`, in its type, and whether that token is a pick."""
    # Positions are within 1/2 of proportional ones; float32 ranks err by up to 1 more, but then picks are far apart
    # (`plan_budget`). So the guess, of picks up to bound - 1, is at most one off.
    guess = ((bound - 1).to(tl.float64) * double_of(picks_per_token)).to(bound.dtype) + 1
    guess = tl.maximum(guess, 1)
    first = (guess <= count) & (fill_position(guess - 1, count, last, step, FLOAT_RANKS) < bound)
    second = (guess < count) & (fill_position(guess, count, last, step, FLOAT_RANKS) < bound)
    below = guess - 1 + first.to(bound.dtype) + second.to(bound.dtype)
    return below, (below < count) & (fill_position(below, count, last, step, FLOAT_RANKS) == bound)
