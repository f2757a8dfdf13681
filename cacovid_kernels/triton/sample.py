"""Gumbel top-k: one launch draws, ranks and weighs rows up to `CHUNK` elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.exact import order_key, rank_word, word_index, word_key
from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.noise import gumbel_noise, random_bits, step_of
from cacovid_kernels.triton.plackett_luce import (
    DRAWS,
    SCRATCH,
    pl_log_prob,
    pl_log_prob_backward,
    pl_log_prob_double_backward,
)
from cacovid_kernels.triton.topk import CHUNK, emit_rows, row_keys, status_bits
from cacovid_kernels.triton.weights import aligned, load_double, race_back, weight_of

SHORT = tl.constexpr(4)


@triton.jit(do_not_specialize=["n", "k", "rows", "samples", "seed", "step", "stream", "row_stride"])
def _race_kernel(
    logits, added_steps, indices, log_prob, status, n: tl.int32, k: tl.int32, rows: tl.int64, samples: tl.int64,
    row_stride: tl.int64, stride: tl.int64, seed: tl.int64, step: tl.int64, stream: tl.int64, BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    row, sample = item % rows, item // rows
    logits += row * row_stride
    i = tl.arange(0, BLOCK)
    x = tl.load(logits + i.to(tl.int64) * stride, mask=i < n, other=0.0).to(tl.float32)
    chance = (x > float("-inf")) & (i < n)
    if sample == 0:
        short = tl.where(tl.sum(chance.to(tl.int32), 0) < k, SHORT, 0)
        tl.store(status + row, status_bits(x) | short)
    if sample < samples:
        zero = tl.zeros((BLOCK,), tl.int64)
        bits = random_bits(i, zero + row, zero + sample, seed, step_of(step, added_steps), stream)
        noise = gumbel_noise(bits)
        key = tl.where(chance, order_key(x + noise), 0)
        word = tl.sort(rank_word(key, i), descending=True)
        index, runs = word_index(word), word_key(word) > 0
        tl.store(indices + item * k + i, tl.where(runs, index, -1), mask=i < k)
        left = load_double(logits + index * stride, runs & (i >= k))
        exponent, total = aligned(*weight_of(left))
        tl.debug_barrier()  # the indices that other threads have written
        value, _, _, _ = race_back(
            logits, indices + item * k, None, None, None, None, n, k, stride, 1, exponent, tl.sum(total, 0), 0.0, 0,
            DRAWS,
        )  # fmt: skip
        tl.store(log_prob + item, value.to(tl.float32))


def gumbel_topk(
    logits: Tensor, k: int, num_samples: int, seed: int, step: int, added_steps: Tensor | None, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices `[S, R, k]` int64 in draw order, their log-probability `[S, R]` float32, status `[R]` int32."""
    rows, n = logits.shape
    indices = torch.empty(num_samples, rows, k, dtype=torch.int64, device=logits.device)
    if n > CHUNK:
        status = _draw_long(logits, k, num_samples, (seed, step, stream), added_steps, indices)
        return indices, pl_log_prob(logits, indices), status
    log_prob = torch.empty(num_samples, rows, dtype=torch.float32, device=logits.device)
    status = torch.empty(rows, dtype=torch.int32, device=logits.device)
    size = block(n)
    launch(
        _race_kernel, (rows * max(num_samples, 1),), logits, added_steps, indices, log_prob, status, n, k, rows,
        num_samples, *logits.stride(), seed, step, stream, num_warps=max(1, min(16, size // 64)), maxnreg=128,
        BLOCK=size, DRAWS=min(size, DRAWS),
    )  # fmt: skip
    return indices, log_prob, status


def _draw_long(
    logits: Tensor, k: int, num_samples: int, key: tuple[int, int, int], added_steps: Tensor | None, indices: Tensor
) -> Tensor:
    """Writes the draws `[S, R, k]` from rows of any length, a few at a time; returns their status `[R]`."""
    rows, n = logits.shape
    flags = torch.zeros(2, rows, dtype=torch.int32, device=logits.device)
    draws = indices.view(num_samples * rows, k)
    items, together = rows * max(num_samples, 1), max(1, SCRATCH // (4 * n))
    for first in range(0, items, together):  # of no samples, too, there is a status
        count = min(together, items - first)
        keys = row_keys(logits, first, count, flags, *key, added_steps, noise=True)
        if num_samples:
            emit_rows(keys, k, draws[first : first + count], ranked=True, pad=True)
    return flags[0] | torch.where(flags[1] < k, 4, 0).int()


__all__ = ["gumbel_topk", "pl_log_prob", "pl_log_prob_backward", "pl_log_prob_double_backward"]
