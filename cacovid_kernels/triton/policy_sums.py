"""Masks of combinations as words, and the sums that the policy loss needs of them, as Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.exact import double_of
from cacovid_kernels.triton.launch import block, double_bits, launch

WORDS = 32  # of a program that packs masks
INDICES = 256  # of a program that packs positions
COUNTED = 1024  # most words that a program holds at a time
TOKENS = 64  # of a program that adds up combinations: one warp, two tokens a thread


@triton.jit(do_not_specialize=["n", "row_words", "blocks"])
def _pack_kernel(
    masks, words, n: tl.int64, row_words: tl.int64, blocks: tl.int64, row_stride: tl.int64, stride: tl.int64,
    WORDS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks * WORDS
    i_word, i_bit = first + tl.arange(0, WORDS), tl.arange(0, 32)
    i = i_word[:, None] * 32 + i_bit[None, :]
    b_mask = tl.load(masks + row * row_stride + i * stride, mask=i < n, other=0)
    bits = tl.sum((b_mask != 0).to(tl.uint32) << i_bit[None, :].to(tl.uint32), 1)
    tl.store(words + row * row_words + i_word, bits.to(tl.int32, bitcast=True), mask=i_word < row_words)


@triton.jit(do_not_specialize=["n", "k", "row_words", "blocks"])
def _mark_kernel(
    indices, words, n: tl.int64, k: tl.int64, row_words: tl.int64, blocks: tl.int64, row_stride: tl.int64,
    stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks * BLOCK
    i = first + tl.arange(0, BLOCK)
    index = tl.load(indices + row * row_stride + i * stride, mask=i < k, other=-1)
    inside = (index >= 0) & (index < n)
    index = tl.where(inside, index, 0)
    bit = (tl.full((BLOCK,), 1, tl.uint32) << (index % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(words + row * row_words + index // 32, bit, mask=inside, sem="relaxed")


@triton.jit
def _bits_set(x):
    """How many bits of uint32 words are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["n", "g", "row_words"])
def _weights_kernel(words, weights, n: tl.int64, g: tl.int64, row_words: tl.int64, BLOCK: tl.constexpr):
    """Weights of kept and of dropped tokens of one combination, balanced (`policy_weights` in policy_loss.h)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, row_words, BLOCK):
        i = first + lane
        word = tl.load(words + row * row_words + i, mask=i < row_words, other=0).to(tl.uint32, bitcast=True)
        beyond = tl.maximum(i * 32 + 32 - n, 0)  # bits that are no tokens
        word = tl.where(
            beyond > 0, word & (tl.full((BLOCK,), 0xFFFFFFFF, tl.uint32) >> (beyond % 32).to(tl.uint32)), word
        )
        count += _bits_set(word)
    kept, tokens = tl.sum(count, 0).to(tl.float64), n.to(tl.float64)
    share = kept / tokens
    total = (kept * (1.0 - share) + (tokens - kept) * share + 1e-7) * g.to(tl.float64)
    tl.store(weights + row * 2, (1.0 - share) / total)
    tl.store(weights + row * 2 + 1, share / total)


@triton.jit
def widened(x):
    """float64 of any float."""
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def _half(x, SIZE: tl.constexpr):
    """The upper half of `[SIZE]` added to the lower half: two numbers have one sum."""
    return tl.sum(tl.reshape(x, (2, SIZE // 2)), 0)


@triton.jit
def _of_lanes(x):
    return tl.sum(_half(_half(_half(_half(x, 32), 16), 8), 4), 0)


@triton.jit(do_not_specialize=["n", "g", "row_words", "blocks", "even_bits"])
def _sums_kernel(
    words, weights, rewards, sums, n: tl.int64, g: tl.int64, row_words: tl.int64, blocks: tl.int64, even_bits: tl.int64,
    video_stride: tl.int64, stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    video, first = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks * BLOCK
    rewards += video * video_stride
    words += video * g * row_words
    lane = tl.arange(0, 32)
    total, squares = tl.zeros((32,), tl.float64), tl.zeros((32,), tl.float64)
    for start in range(0, g, 32):
        total += widened(tl.load(rewards + (start + lane) * stride, mask=start + lane < g, other=0.0))
    mean = _of_lanes(total) / g.to(tl.float64)
    for start in range(0, g, 32):
        distance = widened(tl.load(rewards + (start + lane) * stride, mask=start + lane < g, other=0.0)) - mean
        squares += tl.where(start + lane < g, distance * distance, 0.0)
    deviation = tl.sqrt(_of_lanes(squares) / tl.maximum(g - 1, 1).to(tl.float64)) + 1e-4

    i = first + tl.arange(0, BLOCK)
    shift = (i % 32).to(tl.int32)
    kept_better, kept_worse = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    dropped_better, dropped_worse = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    kept_weight, dropped_weight = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for combination in range(g):
        kept = ((tl.load(words + combination * row_words + i // 32, mask=i < n, other=0) >> shift) & 1) == 1
        advantage = (widened(tl.load(rewards + combination * stride)) - mean) / deviation
        if weights is None:
            weight_kept = double_of(even_bits)
            weight_dropped = weight_kept
        else:
            weight_kept = tl.load(weights + (video * g + combination) * 2)
            weight_dropped = tl.load(weights + (video * g + combination) * 2 + 1)
        earned_kept, earned_dropped = weight_kept * advantage, weight_dropped * advantage
        better = advantage > 0.0
        # Adding 0 changes no sum that began at +0.
        kept_better += tl.where(kept, tl.where(better, earned_kept, 0.0), 0.0)
        kept_worse += tl.where(kept, tl.where(better, 0.0, earned_kept), 0.0)
        dropped_better += tl.where(kept, 0.0, tl.where(better, earned_dropped, 0.0))
        dropped_worse += tl.where(kept, 0.0, tl.where(better, 0.0, earned_dropped))
        kept_weight += tl.where(kept, weight_kept, 0.0)
        dropped_weight += tl.where(kept, 0.0, weight_dropped)
    sums += video * 6 * n + i
    tl.store(sums, kept_better, mask=i < n)
    tl.store(sums + n, kept_worse, mask=i < n)
    tl.store(sums + 2 * n, dropped_better, mask=i < n)
    tl.store(sums + 3 * n, dropped_worse, mask=i < n)
    tl.store(sums + 4 * n, kept_weight, mask=i < n)
    tl.store(sums + 5 * n, dropped_weight, mask=i < n)


def pack_masks(masks: Tensor) -> Tensor:
    """`[R, N]` bool or integers -> `[R, ceil(N / 32)]` int32."""
    rows, n = masks.shape
    words = torch.empty(rows, triton.cdiv(n, 32), dtype=torch.int32, device=masks.device)
    masks = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
    blocks = triton.cdiv(words.shape[1], WORDS)
    launch(_pack_kernel, (rows * blocks,), masks, words, n, words.shape[1], blocks, *masks.stride(), WORDS=WORDS)
    return words


def pack_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """`[R, K]` int64 -> `[R, ceil(num_tokens / 32)]` int32."""
    rows, k = indices.shape
    words = torch.zeros(rows, triton.cdiv(num_tokens, 32), dtype=torch.int32, device=indices.device)
    blocks = triton.cdiv(k, INDICES)
    launch(
        _mark_kernel, (rows * blocks,), indices, words, num_tokens, k, words.shape[1], blocks, *indices.stride(),
        BLOCK=INDICES,
    )  # fmt: skip
    return words


def policy_sums(words: Tensor, rewards: Tensor, num_tokens: int, balanced: bool) -> Tensor:
    """`[B, G, W]` words, `[B, G]` rewards -> `[B, 6, N]` float64: two launches, one if not balanced."""
    (b, g), row_words = rewards.shape, words.shape[-1]
    words = words.contiguous()
    sums = torch.empty(b, 6, num_tokens, dtype=torch.float64, device=words.device)
    weights = None
    if balanced:
        weights = torch.empty(b, g, 2, dtype=torch.float64, device=words.device)
        size = min(block(row_words, 32), COUNTED)
        launch(
            _weights_kernel, (b * g,), words, weights, num_tokens, g, row_words, num_warps=max(1, size // 256),
            BLOCK=size,
        )  # fmt: skip
    even = double_bits(1.0 / (float(num_tokens) * float(g)))
    blocks = triton.cdiv(num_tokens, TOKENS)
    launch(
        _sums_kernel, (b * blocks,), words, weights, rewards, sums, num_tokens, g, row_words, blocks, even,
        *rewards.stride(), num_warps=1, BLOCK=TOKENS,
    )  # fmt: skip
    return sums
