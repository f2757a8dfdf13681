"""The k best of every segment: in registers up to `CHUNK` elements, by radix selection over several programs above."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.exact import order_key, rank_word, word_index, word_key
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.noise import gumbel_noise, random_bits, step_of
from cacovid_kernels.triton.radix import CHUNK, counts_before, row_thresholds

NAN = tl.constexpr(1)
POSINF = tl.constexpr(2)
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # leading bits that tell all order keys apart


def key_bits(dtype: torch.dtype) -> int:
    """How many leading bits of the order keys of this dtype's values differ: the rest repeats the sign."""
    return KEY_BITS[dtype]


@triton.jit
def status_bits(x):
    """Status of a block of float32 scores, int32 scalar; lanes outside the row must hold a finite number."""
    nan = tl.max((x != x).to(tl.int32), 0)
    posinf = tl.max((x == float("inf")).to(tl.int32), 0)
    return nan * NAN + posinf * POSINF


@triton.jit
def kth_largest(digits, k, BITS: tl.constexpr):
    """The k-th largest of uint32 digits below 2^BITS, and how many equal to it belong to the k largest; k may be 0."""
    least = tl.maximum(k, 1)  # for k = 0 the largest of all, of which none is taken
    threshold, bit = tl.full((), 0, tl.uint32), tl.full((), 1 << (BITS - 1), tl.uint32)
    for _ in range(BITS):
        reach = tl.sum((digits >= (threshold | bit)).to(tl.int32), 0)
        threshold = tl.where(reach >= least, threshold | bit, threshold)
        bit = bit >> 1
    return threshold, k - tl.sum((digits > threshold).to(tl.int32), 0)


@triton.jit
def kept_positions(above, equal, ties, above_before, equal_before):
    """Which elements are kept, and the place of each in ascending order.

    `above` and `equal` say how the elements compare with the threshold, of whose equals the first `ties` of the row
    are kept; `*_before` count those of earlier chunks.
    """
    # Both counts in one scan: a chunk has less than 2^16 of either.
    both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    earlier = tl.cumsum(both, 0) - both
    equals = equal_before + (earlier & 0xFFFF)
    return above | (equal & (equals < ties)), above_before + (earlier >> 16) + tl.minimum(equals, ties)


# ---- long rows ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "n", "chunks", "rows", "row_stride", "seed", "step", "stream"])
def _keys_kernel(
    scores, added_steps, keys, flags, first: tl.int64, n: tl.int64, chunks: tl.int64, rows: tl.int64,
    row_stride: tl.int64, stride: tl.int64, seed: tl.int64, step: tl.int64, stream: tl.int64, NOISE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) // chunks
    row = (first + item) % rows
    sample = (first + item) // rows
    i = tl.program_id(0).to(tl.int64) % chunks * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores + row * row_stride + i * stride, mask=i < n, other=0.0).to(tl.float32)
    chance = (x > float("-inf")) & (i < n)
    if NOISE:
        zero = tl.zeros((CHUNK,), tl.int64)
        bits = random_bits(i, zero + row, zero + sample, seed, step_of(step, added_steps), stream)
        noise = gumbel_noise(bits)
        key = tl.where(chance, order_key(x + noise), 0)
    else:
        key = order_key(x)
    tl.store(keys + item * n + i, key.to(tl.int32, bitcast=True), mask=i < n)
    if sample == 0:
        tl.atomic_or(flags + row, status_bits(x), sem="relaxed")
        tl.atomic_add(flags + rows + row, tl.sum(chance.to(tl.int32), 0), sem="relaxed")


@triton.jit(do_not_specialize=["first", "n", "chunks", "k"])
def _emit_kernel(
    keys, thresholds, ties, above, equal, out, first: tl.int64, n: tl.int64, chunks: tl.int64, k: tl.int64,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(keys + row * n + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    threshold = tl.load(thresholds + row).to(tl.uint32)
    before = counts_before(above + row * chunks, chunk), counts_before(equal + row * chunks, chunk)
    kept, at = kept_positions(key > threshold, (key == threshold) & (i < n), tl.load(ties + row), before[0], before[1])
    value = rank_word(key, i) if WORDS else first + row * n + i
    tl.store(out + row * k + at, value, mask=kept)


@triton.jit(do_not_specialize=["first", "n", "blocks", "k"])
def _decode_kernel(words, out, first: tl.int64, n: tl.int64, blocks: tl.int64, k: tl.int64, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) // blocks
    j = tl.program_id(0).to(tl.int64) % blocks * 1024 + tl.arange(0, 1024)
    word = tl.load(words + row * k + j, mask=j < k, other=0)
    index = tl.where(word_key(word) > 0, word_index(word), -1) if PAD else first + row * n + word_index(word)
    tl.store(out + row * k + j, index, mask=j < k)


def row_keys(
    scores: Tensor,
    first: int,
    items: int,
    flags: Tensor,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    added_steps: Tensor | None = None,
    *,
    noise: bool,
) -> Tensor:
    """Order keys `[items, N]` of rows `[R, N]`, with Gumbel noise or without: int32, the bits of uint32.

    Item i is row (first + i) % R of sample (first + i) // R. Noise leaves 0 to scores without a chance. For every row
    of sample 0 `flags` `[2, R]` int32, which starts as zeros, gets its status and how many scores are above -inf.
    """
    rows, n = scores.shape
    chunks = triton.cdiv(n, CHUNK)
    keys = torch.empty(items, n, dtype=torch.int32, device=scores.device)
    launch(
        _keys_kernel, (items * chunks,), scores, added_steps, keys, flags, first, n, chunks, rows, scores.stride(0),
        scores.stride(1), seed, step, stream, num_warps=16, NOISE=noise, CHUNK=CHUNK,
    )  # fmt: skip
    return keys


def emit_rows(keys: Tensor, k: int, out: Tensor, *, first: int = 0, ranked: bool, pad: bool = False) -> None:
    """Writes the k best of every row of order keys `[R, N]` to `out` `[R, k]`.

    Row r's element i is called first + r * N + i, or with `pad` i, and -1 where its key is 0. In falling order if
    `ranked`, else ascending.
    """
    rows, n = keys.shape
    if k == 0:
        return
    chunks, blocks = triton.cdiv(n, CHUNK), triton.cdiv(k, 1024)
    wanted = torch.full((rows,), k, dtype=torch.int64, device=keys.device)
    found = torch.empty_like(out) if ranked else out
    launch(
        _emit_kernel, (rows * chunks,), keys, *row_thresholds(keys, wanted), found, first, n, chunks, k, num_warps=8,
        WORDS=ranked, CHUNK=CHUNK,
    )  # fmt: skip
    if ranked:
        words = torch.sort(found, descending=True).values
        launch(_decode_kernel, (rows * blocks,), words, out, first, n, blocks, k, PAD=pad)


# ---- segments -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "n", "k", "row_stride"])
def _rows_kernel(
    scores, out, status, first: tl.int64, n: tl.int32, k: tl.int32, row_stride: tl.int64, stride: tl.int64,
    RANKED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(scores + row * row_stride + i.to(tl.int64) * stride, mask=i < n, other=0.0).to(tl.float32)
    tl.store(status + row, status_bits(x))
    key = tl.where(i < n, order_key(x), 0)  # what is no element ranks last: after NaN, by its position
    start = first + row * n
    if RANKED:
        word = tl.sort(rank_word(key, i), descending=True)
        tl.store(out + row * k + i, start + word_index(word), mask=i < k)
    else:
        digits = key >> (32 - BITS)
        threshold, ties = kth_largest(digits, k, BITS)
        kept, at = kept_positions(digits > threshold, digits == threshold, ties, 0, 0)
        tl.store(out + row * k + at, start + i, mask=kept)


def sorting_warps(size: int) -> int:
    """Warps with which a block of this many rank words is sorted without spilling registers."""
    return max(1, min(16, size // 128))


def _run(rows: Tensor, first: int, k: int, ranked: bool, out: Tensor, status: Tensor) -> None:
    """The k best of rows `[R, n]` that start at flat position `first`, to `out` `[R * k]` and `status` `[R]`."""
    count, n = rows.shape
    if n > CHUNK:
        flags = torch.zeros(2, count, dtype=torch.int32, device=rows.device)
        keys = row_keys(rows, 0, count, flags, noise=False)
        emit_rows(keys, k, out.view(count, k), first=first, ranked=ranked)
        status.copy_(flags[0])
        return
    size = block(n)
    launch(
        _rows_kernel, (count,), rows, out, status, first, n, k, rows.stride(0), rows.stride(1),
        num_warps=sorting_warps(size) if ranked else max(1, min(8, size // 512)),
        RANKED=ranked, BITS=key_bits(rows.dtype), BLOCK=size,
    )  # fmt: skip


def segmented_topk(scores: Tensor, cu_seqlens: list[int], k: list[int], by_score: bool) -> tuple[Tensor, Tensor]:
    """Flat positions of the k[s] best of every segment [sum of k] int64 and status [S] int32."""
    indices = torch.empty(sum(k), dtype=torch.int64, device=scores.device)
    status = torch.empty(len(k), dtype=torch.int32, device=scores.device)
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    s = out = 0
    while s < len(k):
        n, start, end = lengths[s], cu_seqlens[s], s + 1
        while end < len(k) and lengths[end] == n and k[end] == k[s]:
            end += 1
        if scores.dim() == 2:
            rows = scores[s:end]
        else:
            step = scores.stride(0)
            rows = scores.as_strided((end - s, n), (n * step, step), scores.storage_offset() + start * step)
        kept = (end - s) * k[s]
        _run(rows, start, k[s], by_score, indices[out : out + kept], status[s:end])
        s, out = end, out + kept
    return indices, status
