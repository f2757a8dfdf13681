"""The k-th largest key of rows of any length, by counting digits.

A row is cut into chunks of `CHUNK` keys, a program each. Three launches count digits of 11, 11 and 10 bits, each
reading the histograms of the launches before it, and a fourth counts what every chunk keeps, so that a chunk knows
where its own elements go. All sums are of integers: the order of the programs changes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.launch import launch

CHUNK = 4096
BINS = tl.constexpr(2048)


@triton.jit
def _prefix(histograms, row, rows, k, PASSES: tl.constexpr):
    """The first digits of the k-th largest key, and its place among the keys that share them, from 1."""
    prefix = tl.full((), 0, tl.uint32)
    left = tl.maximum(k, 1).to(tl.int32)
    digit = tl.arange(0, BINS)
    for p in tl.static_range(PASSES):
        count = tl.load(histograms + (p * rows + row) * BINS + digit)
        reached = tl.cumsum(count, 0, reverse=True)  # keys with this digit or a larger one
        found = tl.max(tl.where(reached >= left, digit, 0), 0)
        left -= tl.sum(tl.where(digit > found, count, 0), 0)
        prefix = (prefix << (11 if p < 2 else 10)) | found.to(tl.uint32)
    return prefix, left


@triton.jit(do_not_specialize=["n", "chunks", "rows"])
def _histogram_kernel(
    keys, ks, histograms, n: tl.int64, chunks: tl.int64, rows: tl.int64, PASS: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) // chunks
    i = tl.program_id(0).to(tl.int64) % chunks * CHUNK + tl.arange(0, CHUNK)
    prefix, _ = _prefix(histograms, row, rows, tl.load(ks + row), PASS)
    key = tl.load(keys + row * n + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    if PASS == 0:
        digit, counts = key >> 21, i < n
    elif PASS == 1:
        digit, counts = (key >> 10) & 2047, (i < n) & (key >> 21 == prefix)
    else:
        digit, counts = key & 1023, (i < n) & (key >> 10 == prefix)
    count = tl.histogram(digit.to(tl.int32), BINS, counts)
    at = histograms + (PASS * rows + row) * BINS + tl.arange(0, BINS)
    tl.atomic_add(at, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "chunks", "rows"])
def _count_kernel(
    keys, ks, histograms, thresholds, ties, above, equal, n: tl.int64, chunks: tl.int64, rows: tl.int64,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    k = tl.load(ks + row)
    threshold, left = _prefix(histograms, row, rows, k, 3)
    key = tl.load(keys + row * n + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    tl.store(above + row * chunks + chunk, tl.sum((key > threshold).to(tl.int64), 0))
    tl.store(equal + row * chunks + chunk, tl.sum(((key == threshold) & (i < n)).to(tl.int64), 0))
    if chunk == 0:
        tl.store(thresholds + row, threshold.to(tl.int64))
        tl.store(ties + row, tl.where(k > 0, left, 0).to(tl.int64))


def row_thresholds(keys: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k-th largest order key of every row, and what each chunk of the row keeps.

    Args:
        keys: `[R, N]` int32, the bits of uint32 order keys; contiguous, 0 < N < 2^31.
        k: `[R]` int64 on the same device, each in [0, N].

    Returns:
        Thresholds `[R]` int64 in [0, 2^32); how many of the keys equal to it are taken, `[R]` int64; and the number of
        keys above and equal to it in every chunk of `CHUNK` elements, `[R, C]` int64 each.
    """
    (rows, n), device = keys.shape, keys.device
    chunks = triton.cdiv(n, CHUNK)
    histograms = torch.zeros(3, rows, 2048, dtype=torch.int32, device=device)
    for digits in range(3):
        launch(
            _histogram_kernel, (rows * chunks,), keys, k, histograms, n, chunks, rows, num_warps=8,
            PASS=digits, CHUNK=CHUNK,
        )  # fmt: skip
    thresholds, ties = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    above, equal = (torch.empty(rows, chunks, dtype=torch.int64, device=device) for _ in range(2))
    launch(
        _count_kernel, (rows * chunks,), keys, k, histograms, thresholds, ties, above, equal, n, chunks, rows,
        num_warps=8, CHUNK=CHUNK,
    )  # fmt: skip
    return thresholds, ties, above, equal


@triton.jit
def counts_before(counts, chunk):
    """Sum of the counts `[C]` of the chunks before this one."""
    slot = tl.arange(0, 512)
    total = tl.zeros((512,), tl.int64)
    first = tl.cast(chunk, tl.int64) * 0
    while first < chunk:
        total += tl.load(counts + first + slot, mask=first + slot < chunk, other=0)
        first += 512
    return tl.sum(total, 0)
