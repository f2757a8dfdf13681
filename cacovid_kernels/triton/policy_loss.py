"""The policy loss and its gradient as Triton kernels: the twin of `csrc/include/cacovid/policy_loss.h`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.reference.policy_loss import policy_loss_backward
from cacovid_kernels.triton.exact import double_of, exp_exact
from cacovid_kernels.triton.launch import double_bits, launch
from cacovid_kernels.triton.policy_sums import pack_indices, pack_masks, policy_sums, widened

TOKENS = 256  # of a program: two per thread of 4 warps
PARTS = 1024  # losses of programs that the last launch adds up at a time


@triton.jit
def _load_odds(logits, i, live, stride, pair_stride, PAIRS: tl.constexpr):
    """float64 log-odds of keeping; 0 where not live."""
    x = widened(tl.load(logits + i * stride, mask=live, other=0.0))
    if PAIRS:
        x = widened(tl.load(logits + i * stride + pair_stride, mask=live, other=0.0)) - x
    return x


@triton.jit
def _log_1p_exact(x):
    """ln(1 + x) for x in [0, 1]."""
    s = x / (2.0 + x)
    t = s * s
    p = tl.full(x.shape, 1.0 / 33.0, tl.float64)
    for i in tl.static_range(16):
        p = p * t + 1.0 / (31 - 2 * i)
    return 2.0 * s * p


@triton.jit
def _scaled_exp(x, factor):
    """factor * e^x, at most factor * e^700; NaN for NaN."""
    return tl.where(x == x, factor * exp_exact(tl.where(x > 700.0, 700.0, x)), x)


@triton.jit
def _clipped_term(ratio, better, worse, low, high):
    loss = better * tl.where(ratio > high, high, ratio) + worse * tl.where(ratio < low, low, ratio)
    gradient = better * tl.where(ratio > high, 0.0, ratio) + worse * tl.where(ratio < low, 0.0, ratio)
    return -loss, -gradient


@triton.jit
def _divergence_term(half_by_p, log_p, weight):
    half_by_p = tl.where(half_by_p > 1e300, 1e300, half_by_p)
    log_p = tl.where(log_p < -1e200, -1e200, log_p)
    return weight * (half_by_p + 0.6931471805599453 + log_p - 1.0), weight * (1.0 - half_by_p)


@triton.jit(do_not_specialize=["n", "blocks", "low_bits", "high_bits", "kl_bits", "scale_bits"])
def _loss_kernel(
    logits, old_logits, sums, parts, gradient, n: tl.int64, blocks: tl.int64, low_bits: tl.int64, high_bits: tl.int64,
    kl_bits: tl.int64, scale_bits: tl.int64, video_stride: tl.int64, stride: tl.int64, pair_stride: tl.int64,
    old_video_stride: tl.int64, old_stride: tl.int64, old_pair_stride: tl.int64, PAIRS: tl.constexpr,
    OLD_PAIRS: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    video, i = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    odds = _load_odds(logits + video * video_stride, i, live, stride, pair_stride, PAIRS)
    old_odds = _load_odds(old_logits + video * old_video_stride, i, live, old_stride, old_pair_stride, OLD_PAIRS)
    sums += video * 6 * n + i
    low, high = double_of(low_bits), double_of(high_bits)

    ln_kept, ln_dropped = tl.where(odds > 0.0, 0.0, odds), tl.where(odds < 0.0, 0.0, -odds)
    old_kept, old_dropped = tl.where(old_odds > 0.0, 0.0, old_odds), tl.where(old_odds < 0.0, 0.0, -old_odds)
    tail, old_tail = exp_exact(-tl.abs(odds)), exp_exact(-tl.abs(old_odds))
    larger = 1.0 / (1.0 + tail)
    smaller = tail * larger
    shared = (1.0 + old_tail) * larger
    loss, by_kept = _clipped_term(
        _scaled_exp(ln_kept - old_kept, shared),
        tl.load(sums, mask=live, other=0.0), tl.load(sums + n, mask=live, other=0.0), low, high,
    )  # fmt: skip
    loss_dropped, by_dropped = _clipped_term(
        _scaled_exp(ln_dropped - old_dropped, shared),
        tl.load(sums + 2 * n, mask=live, other=0.0), tl.load(sums + 3 * n, mask=live, other=0.0), low, high,
    )  # fmt: skip
    if DIVERGENCE:
        log_total, half_by_larger = _log_1p_exact(tail), 0.5 * (1.0 + tail)
        half_by_smaller = half_by_larger / tail
        kl_kept, kl_by_kept = _divergence_term(
            tl.where(odds > 0.0, half_by_larger, half_by_smaller), ln_kept - log_total,
            double_of(kl_bits) * tl.load(sums + 4 * n, mask=live, other=0.0),
        )  # fmt: skip
        kl_dropped, kl_by_dropped = _divergence_term(
            tl.where(odds > 0.0, half_by_smaller, half_by_larger), ln_dropped - log_total,
            double_of(kl_bits) * tl.load(sums + 5 * n, mask=live, other=0.0),
        )  # fmt: skip
        loss, by_kept = kl_kept + loss, kl_by_kept + by_kept
        loss_dropped, by_dropped = kl_dropped + loss_dropped, kl_by_dropped + by_dropped
    p_kept, p_dropped = tl.where(odds > 0.0, larger, smaller), tl.where(odds > 0.0, smaller, larger)
    by_odds = ((by_kept * p_dropped - by_dropped * p_kept) * double_of(scale_bits)).to(gradient.dtype.element_ty)
    if PAIRS:
        at = gradient + (video * n + i) * 2
        tl.store(at, -by_odds, mask=live)
        tl.store(at + 1, by_odds, mask=live)
    else:
        tl.store(gradient + video * n + i, by_odds, mask=live)
    tl.store(parts + program, tl.sum(tl.where(live, loss + loss_dropped, 0.0), 0))


@triton.jit(do_not_specialize=["count", "scale_bits"])
def _total_kernel(parts, loss, count: tl.int64, scale_bits: tl.int64, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(parts + i, mask=i < count, other=0.0)
    tl.store(loss, (tl.sum(total, 0) * double_of(scale_bits)).to(loss.dtype.element_ty))


def policy_loss(
    logits: Tensor, old_logits: Tensor, sums: Tensor, eps_low: float, eps_high: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient of the shape of `logits`, in two launches."""
    b, n = logits.shape[:2]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=dtype, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    blocks = triton.cdiv(n, TOKENS)
    parts = torch.empty(b * blocks, dtype=torch.float64, device=logits.device)
    bits = [double_bits(x) for x in (1.0 - eps_low, 1.0 + eps_high, kl_weight, 1.0 / b)]
    strides = [stride for x in (logits, old_logits) for stride in (*x.stride(), 0)[:3]]
    launch(
        _loss_kernel, (b * blocks,), logits, old_logits, sums.contiguous(), parts, gradient, n, blocks, *bits, *strides,
        PAIRS=logits.dim() == 3, OLD_PAIRS=old_logits.dim() == 3, DIVERGENCE=kl_weight != 0.0, BLOCK=TOKENS,
    )  # fmt: skip
    launch(_total_kernel, (1,), parts, loss, b * blocks, bits[3], BLOCK=PARTS)
    return loss, gradient


def policy_loss_once(
    logits: Tensor,
    old_logits: Tensor,
    words: Tensor,
    rewards: Tensor,
    balanced: bool,
    eps_low: float,
    eps_high: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient straight from the masks: the launches of both."""
    sums = policy_sums(words, rewards, logits.shape[1], balanced)
    return policy_loss(logits, old_logits, sums, eps_low, eps_high, kl_weight)


__all__ = ["pack_indices", "pack_masks", "policy_loss", "policy_loss_backward", "policy_loss_once", "policy_sums"]
