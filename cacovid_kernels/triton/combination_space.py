"""The distribution that combinations of a frame's tokens, or of a video's frames, are drawn from, in rank order.

Integer sums and the arithmetic of `exact` and `noise`: the groups drawn and the weights have the same bits everywhere.
"""

import triton
import triton.language as tl

from cacovid_kernels.triton.exact import from_fixed, order_key, rank_word, round_even, to_fixed, word_key
from cacovid_kernels.triton.noise import exp_float

KEY_NEG_INF = tl.constexpr(0x007FFFFF)
KEY_POS_INF = tl.constexpr(0xFF800000)


@triton.jit
def ranked_words(scores, step, count, N: tl.constexpr):
    """Rank words `[N]` of `count` scores, the first place first; positions from `count` on rank behind NaN."""
    i = tl.arange(0, N)
    score = tl.load(scores + i.to(tl.int64) * step, mask=i < count, other=0.0).to(tl.float32)
    key = tl.where(i < count, order_key(score), 0)
    return tl.sort(rank_word(key, i), descending=True)


@triton.jit
def count_chances(key):
    """How many scores are numbers above -inf: only they are ever drawn."""
    return tl.sum((key > KEY_NEG_INF).to(tl.int32), 0)


@triton.jit
def status_bits(key, count, wanted):
    """Bits of `Status` of ranked keys, int32: NaN, +inf, and fewer chances than wanted."""
    rank = tl.arange(0, key.shape[0])
    nan = tl.max(((key == 0) & (rank < count)).to(tl.int32), 0)
    posinf = tl.max((key == KEY_POS_INF).to(tl.int32), 0)
    return nan + 2 * posinf + tl.where(count_chances(key) < wanted, 4, 0)


@triton.jit
def key_score(key):
    """The score of an order key, float32."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def exps(key, best):
    """exp(score - best score) of order keys, float32, 0 for -inf and NaN; beside +inf 1 for those and 0 for others."""
    falls = (key > KEY_NEG_INF) & (best < KEY_POS_INF)
    e = exp_float(tl.where(falls, key_score(key) - key_score(best), -88.0))
    return tl.where(best == KEY_POS_INF, tl.where(key == KEY_POS_INF, 1.0, 0.0), e)


@triton.jit
def _raise_shares(share, least, first, count):
    """Shares of the groups [first, count) are at least `least`; also their sum, and the first of them."""
    g = tl.arange(0, share.shape[0])
    racing = (g >= first) & (g < count)
    share = tl.where(racing, tl.maximum(share, least), share)
    norm = from_fixed(tl.sum(tl.where(racing, to_fixed(share), 0), 0))
    return share, norm, tl.sum(tl.where(g == first, share, 0.0), 0)


@triton.jit
def cap_shares(share, count, cap):
    """Shares `[G]` float64 that never rise, of which the first `count` matter -> probabilities, 0 for the others.

    None exceeds the cap or falls below 1/count^2 of what is left for it: the largest is cut to the cap, the others
    are normalised again, and so on.
    """
    g = tl.arange(0, share.shape[0])
    feasible = 1.0 / count.to(tl.float64)
    floor = feasible * feasible
    cap = tl.minimum(tl.maximum(cap, feasible), 0.999)
    rest = tl.full((), 1.0, tl.float64)  # shares from `first` on are share / norm of rest
    first = tl.full((), 0, tl.int32)
    share, norm, largest = _raise_shares(share, floor, first, count)
    while (first < count - 1) & (largest > cap * norm):
        share = tl.where(g == first, cap * rest, share)
        rest = rest * (1.0 - cap)
        cap = tl.minimum(cap / (1.0 - cap), 0.999)
        first += 1
        share, norm, largest = _raise_shares(share, floor * norm, first, count)
    return tl.where(g < first, share, tl.where(g < count, share * (rest / norm), 0.0))


@triton.jit
def group_start(group, size, remainder):
    """The rank at which a group starts; the first `remainder` groups hold `size` + 1 tokens, the others `size`."""
    return group * size + tl.minimum(group, remainder)


@triton.jit
def group_space(word, memory, tokens, num_draw, size, remainder, num_groups, cap, G: tl.constexpr):
    """From a frame's ranked tokens: probability of every group `[G]` float64, 0 beyond the groups that can be drawn,
    and what turns exp(score - best) into a weight inside the group, `[G]` float32. `memory` is for this program."""
    key = word_key(word)
    fixed = to_fixed(exps(key, tl.max(key, 0)).to(tl.float64))
    total = from_fixed(tl.maximum(tl.sum(fixed, 0), 1))
    tl.store(memory + tl.arange(0, word.shape[0]), tl.cumsum(fixed, 0))
    tl.debug_barrier()
    g = tl.arange(0, G)
    start = tl.minimum(group_start(g, size, remainder), tokens)
    end = tl.minimum(group_start(g + 1, size, remainder), tokens)
    before = tl.load(memory + start - 1, mask=start > 0, other=0)
    share = from_fixed(tl.load(memory + end - 1) - before) * (1.0 / total)
    tl.debug_barrier()
    drawable = (g < num_groups) & (start + num_draw <= count_chances(key))  # they hold num_draw tokens with a chance
    probability = cap_shares(share, tl.maximum(tl.sum(drawable.to(tl.int32), 0), 1), cap)
    return probability, (1.0 / (total * (share + 1e-8))).to(tl.float32)


@triton.jit
def token_weights(key, best, scale, size):
    """Weights inside a group, within [1/2, 2] of uniform, float32; scores without a chance have one too."""
    uniform = (1.0 / size.to(tl.float64)).to(tl.float32)
    return tl.minimum(tl.maximum(exps(key, best) * scale, 0.5 * uniform), 2.0 * uniform)


@triton.jit
def running_shares(probability):
    """Running sums of probabilities as integers, of 2^30: a group is drawn by the first that exceeds a threshold."""
    return tl.cumsum(round_even(probability * 1073741824.0).to(tl.int64), 0)


@triton.jit
def frame_weights(key, frames, num_samples, STRICT: tl.constexpr):
    """Weights `[T]` float32 that frames are drawn by, from their ranked keys; 0 without a chance."""
    e = exps(key, tl.max(key, 0)).to(tl.float64)
    share = e * (1.0 / from_fixed(tl.maximum(tl.sum(to_fixed(e), 0), 1)))
    if STRICT:
        share = cap_shares(share, tl.maximum(count_chances(key), 1), 3.0 / frames.to(tl.float64))
    else:
        samples = num_samples.to(tl.float64)
        share = tl.maximum(share, 1.0 / (samples * samples))
    return tl.where(key > KEY_NEG_INF, share.to(tl.float32), 0.0)
