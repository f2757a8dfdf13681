"""How many tokens each frame keeps: the Triton twin of `csrc/include/cacovid/budget.h`.

Whatever does not depend on a score is arithmetic of the host (`plan_budget`). A kernel takes it as the arguments that
`BudgetPlan.shares` and `BudgetPlan.picks` list, real numbers as bits, because a launch would round them to float32.
"""

import math
import struct
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.exact import double_of, exp_exact, from_fixed, round_even, to_fixed
from cacovid_kernels.triton.launch import block, double_bits, launch

NAN = tl.constexpr(1)
POSINF = tl.constexpr(2)


class BudgetPlan(NamedTuple):
    """Everything about a video's budget that the host knows before it sees a score."""

    frames: int
    tokens_per_frame: int
    num_keep: int  # tokens kept in the video, exactly
    num_ranked: int  # of these, how many are chosen by score; the rest fill uniformly
    cap: int  # most ranked tokens of one frame before levelling
    quota: float  # ranked tokens that the frame weights are multiplied with
    weight_min: float  # clip of the frame softmax
    weight_max: float
    float_ranks: bool  # uniform ranks as float32 linspace (published code) or exact integers

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * self.tokens_per_frame

    def shares(self) -> tuple[int, ...]:
        """Arguments of a kernel: ranked, cap, quota, low, high."""
        return self.num_ranked, self.cap, *map(double_bits, (self.quota, self.weight_min, self.weight_max))

    def picks(self) -> tuple[int, ...]:
        """Arguments of a kernel: count, last, step, picks_per_token."""
        count, last = self.num_keep - self.num_ranked, self.tokens - self.num_ranked - 1
        step = last / max(count - 1, 1)
        if self.float_ranks:  # float32 numbers divided in float64, then rounded: the same as divided in float32
            (step,) = struct.unpack("<f", struct.pack("<f", step))
        return count, last, double_bits(step), double_bits((count - 1) / last if count > 1 else 0.0)


def _bounded(x: float, low: float, high: float) -> float:
    """x inside [low, high]; NaN gives high. No ratio, however odd, may become a size that memory depends on."""
    return high if not x < high else max(x, low)


@lru_cache(maxsize=1024)
def plan_budget(
    grid: tuple[int, int, int],
    num_keep: int,
    keep_ratio: float,
    importance_ratio: float,
    max_frame_ratio: float,
    strict: bool,
    fill: bool,
) -> BudgetPlan:
    """The plan of one video. The order of the products is the published one: it decides the side of an integer."""
    t, h, w = grid
    ranked = _bounded(importance_ratio * keep_ratio * h * w * t, 0.0, float(t * h * w))
    num_ranked = num_keep if not fill or importance_ratio == 1.0 else min(num_keep, math.floor(ranked))
    cap = int(_bounded(importance_ratio * h * w * max_frame_ratio, 0.0, float(h * w)))
    if strict:
        cap = min(max(cap, -(-num_ranked // t)), h * w)
    # float32 ranks stay strictly increasing while the spacing exceeds 1 by more than its rounding.
    last, gaps = t * h * w - num_ranked - 1, num_keep - num_ranked - 1
    float_ranks = not strict and gaps > 0 and last < 2**24 and last > gaps * (1.0 + (last + 1.0) * 2.0**-21)
    high = _bounded(1.0 / (t * keep_ratio) * max_frame_ratio, 0.0, 1.0)
    return BudgetPlan(t, h * w, num_keep, num_ranked, cap, float(round(ranked)), 1.0 / (2.0 * t), high, float_ranks)


# ---- frame shares -------------------------------------------------------------------------------


@triton.jit
def frame_flags(x):
    """Status bits of every frame score, int32."""
    return (x != x).to(tl.int32) * NAN + (x == float("inf")).to(tl.int32) * POSINF


@triton.jit
def magnitude(x):
    """|x| of finite float64 values, 0 of others."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def frame_logit(x, largest):
    """Scores scaled to [-3, 3], the largest magnitude to 3; -inf and NaN to -inf. Never falls as x rises."""
    # 0 where every finite score is 0: the published code divides zero by zero there.
    scaled = tl.where(largest > 0.0, x / tl.where(largest > 0.0, largest, 1.0) * 3.0, 0.0)
    logit = tl.where(tl.abs(x) < float("inf"), scaled, float("-inf"))
    return tl.where(x == float("inf"), 3.0, logit)


@triton.jit
def frame_exp(logit, top):
    """e^(logit - top); 1 where no frame has a score to go by."""
    hopeless = top == float("-inf")
    return tl.where(hopeless, 1.0, exp_exact(logit - tl.where(hopeless, 0.0, top)))


@triton.jit
def fixed_weight(e, norm, low, high):
    """The clipped softmax in fixed point, int64."""
    weight = e / norm
    weight = tl.where(weight < double_of(low), double_of(low), weight)
    return to_fixed(tl.where(weight > double_of(high), double_of(high), weight))


@triton.jit
def frame_share(weight, total, quota, cap):
    """Tokens of a frame before levelling, int64; `total` is the sum of all weights."""
    share = round_even(weight.to(tl.float64) * double_of(quota) / tl.maximum(total, 1).to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(share, 1), cap)


@triton.jit
def mirrored(counts, tokens, down):
    """Counts from the other end where tokens are taken off: the largest come down as the smallest go up."""
    return tl.where(down, tokens - counts, counts)


@triton.jit
def video_budget(x, present, tokens, ranked, cap, quota, low, high, BITS: tl.constexpr):
    """Ranked tokens of every frame of a video whose scores, float64, are one block; int32, 0 where not `present`.

    The counts are brought to `ranked` in sum by adding to the smallest, or taking off the largest, one by one, the
    first frame first among equals: found as a water level, bit by bit from above, for frames of less than 2^BITS.
    """
    largest = tl.max(tl.where(present, magnitude(x), 0.0), 0)
    logit = frame_logit(x, largest)
    top = tl.max(tl.where(present, logit, float("-inf")), 0)
    e = tl.where(present, frame_exp(logit, top), 0.0)
    weight = tl.where(present, fixed_weight(e, from_fixed(tl.sum(to_fixed(e), 0)), low, high), 0)
    counts = tl.where(present, frame_share(weight, tl.sum(weight, 0), quota, cap), 0).to(tl.int32)
    missing = ranked - tl.sum(counts, 0)
    down, need = missing < 0, tl.abs(missing)
    counts = mirrored(counts, tokens, down)
    water, bit = tl.full((), 0, tl.int32), tl.full((), 1 << (BITS - 1), tl.int32)
    for _ in range(BITS):
        volume = tl.sum(tl.where(present, tl.maximum((water | bit) - counts, 0), 0), 0)
        water = tl.where(((water | bit) <= tokens) & (volume <= need), water | bit, water)
        bit = bit >> 1
    rest = need - tl.sum(tl.where(present, tl.maximum(water - counts, 0), 0), 0)
    counts = tl.maximum(counts, water)
    level = (present & (counts == water)).to(tl.int32)
    counts += tl.where(tl.cumsum(level, 0) <= rest, level, 0)
    return tl.where(present, mirrored(counts, tokens, down), 0)


# ---- videos of any length -----------------------------------------------------------------------


@triton.jit
def load_frame_scores(scores, frame, present, stride):
    """Scores of frames as float64; all 0 where there are none, and outside."""
    if scores is not None:
        return tl.load(scores + frame * stride, mask=present, other=0.0).to(tl.float32).to(tl.float64)
    else:
        return tl.zeros(frame.shape, tl.float64)


@triton.jit(
    do_not_specialize=["stride", "first", "frames", "tokens", "top_bit", "ranked", "cap", "quota", "low", "high"]
)
def _budget_kernel(
    scores, counts, before, status, stride: tl.int64, first: tl.int64, frames: tl.int64, tokens: tl.int64,
    top_bit: tl.int64, ranked: tl.int64, cap: tl.int64, quota: tl.int64, low: tl.int64, high: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`video_budget` in several passes over one video; between them `counts` holds its weights, then its shares."""
    first += tl.program_id(0).to(tl.int64) * frames
    slot = tl.arange(0, BLOCK).to(tl.int64)
    zero = tl.zeros((BLOCK,), tl.int64)

    largest, best = tl.zeros((BLOCK,), tl.float64), tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(0, frames, BLOCK):
        present = start + slot < frames
        x = load_frame_scores(scores, first + start + slot, present, stride)
        tl.store(status + first + start + slot, frame_flags(x), mask=present)
        largest = tl.maximum(largest, magnitude(x))
        best = tl.where(present & (x > best), x, best)
    largest = tl.max(largest, 0)
    top = frame_logit(tl.max(best, 0), largest)

    total = zero
    for start in range(0, frames, BLOCK):
        present = start + slot < frames
        x = load_frame_scores(scores, first + start + slot, present, stride)
        total += tl.where(present, to_fixed(frame_exp(frame_logit(x, largest), top)), 0)
    norm = from_fixed(tl.sum(total, 0))

    total = zero
    for start in range(0, frames, BLOCK):
        present = start + slot < frames
        x = load_frame_scores(scores, first + start + slot, present, stride)
        weight = fixed_weight(frame_exp(frame_logit(x, largest), top), norm, low, high)
        tl.store(counts + first + start + slot, weight, mask=present)
        total += tl.where(present, weight, 0)
    weights = tl.sum(total, 0)
    tl.debug_barrier()

    total = zero
    for start in range(0, frames, BLOCK):
        present = start + slot < frames
        weight = tl.load(counts + first + start + slot, mask=present, other=0)
        share = tl.where(present, frame_share(weight, weights, quota, cap), 0)
        tl.store(counts + first + start + slot, share, mask=present)
        total += share
    missing = ranked - tl.sum(total, 0)
    down, need = missing < 0, tl.abs(missing)
    tl.debug_barrier()

    water, bit, rest = tl.full((), 0, tl.int64), top_bit, need
    while bit > 0:
        total = zero
        for start in range(0, frames, BLOCK):
            present = start + slot < frames
            count = mirrored(tl.load(counts + first + start + slot, mask=present, other=0), tokens, down)
            total += tl.where(present, tl.maximum((water | bit) - count, 0), 0)
        volume = tl.sum(total, 0)
        lower = ((water | bit) <= tokens) & (volume <= need)
        water, rest = tl.where(lower, water | bit, water), tl.where(lower, need - volume, rest)
        bit = bit >> 1

    done = tl.full((), 0, tl.int64)
    for start in range(0, frames, BLOCK):
        present = start + slot < frames
        count = mirrored(tl.load(counts + first + start + slot, mask=present, other=0), tokens, down)
        count = tl.maximum(count, water)
        level = (present & (count == water)).to(tl.int64)
        count += tl.where(tl.cumsum(level, 0) <= rest, level, 0)
        rest -= tl.sum(level, 0)
        count = tl.where(present, mirrored(count, tokens, down), 0)
        tl.store(before + first + start + slot, done + tl.cumsum(count, 0) - count, mask=present)
        tl.store(counts + first + start + slot, count, mask=present)
        done += tl.sum(count, 0)


def video_budgets(
    scores: Tensor | None, plan: BudgetPlan, videos: int, stride: int, first: int, counts: Tensor, status: Tensor
) -> Tensor:
    """Writes counts and status of the frames of equally planned videos from frame `first` on, whatever their length.

    Returns:
        `[F]` int64 like `counts`: ranked tokens of the earlier frames of the same video.
    """
    before = torch.empty_like(counts)
    size = min(block(plan.frames), 1024)
    top_bit = 1 << (plan.tokens_per_frame.bit_length() - 1)
    launch(
        _budget_kernel, (videos,), scores, counts, before, status, stride, first, plan.frames, plan.tokens_per_frame,
        top_bit, *plan.shares(), num_warps=max(1, size // 256), BLOCK=size,
    )  # fmt: skip
    return before
