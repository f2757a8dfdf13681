"""The probability of ordered draws without replacement, and its derivatives.

Weights are pairs (top, total): ln weight = top + ln total, with `top` the largest logit among them. Sums of pairs never
overflow, whatever the range of the logits, and nothing is ever subtracted: the race gains weight from its last stage
to its first. A table `stage` says for every item when it was drawn, k for never; with the logarithm of each stage's
total weight it gives every item's gradient in a pass of its own.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.launch import block, launch

SCRATCH = 1 << 28  # bytes that the samples of one launch may need
MOST = 1024  # elements that a program holds at a time
NOBODY = tl.constexpr(-1.7976931348623157e308)  # the top of no weight at all: differences of tops stay numbers


@triton.jit
def load_double(pointers, mask):
    """float64 logits, -inf where masked."""
    x = tl.load(pointers, mask=mask, other=float("-inf"))
    return x if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def weight_of(logit):
    """The pair of one float64 logit that is not NaN."""
    somebody = logit > float("-inf")
    return tl.where(somebody, logit, NOBODY), somebody.to(tl.float64)


@triton.jit
def _factors(top_a, top_b):
    """The common top of two weights, and what each total is multiplied by to refer to it."""
    # Two infinite tops have no difference.
    ratio = tl.exp(tl.where(top_a == top_b, 0.0, -tl.abs(top_a - top_b)))
    return tl.maximum(top_a, top_b), tl.where(top_a >= top_b, 1.0, ratio), tl.where(top_a >= top_b, ratio, 1.0)


@triton.jit
def add_weights(top_a, total_a, top_b, total_b):
    """The pair of the sum of two weights."""
    top, factor_a, factor_b = _factors(top_a, top_b)
    return top, total_a * factor_a + total_b * factor_b


@triton.jit
def _add_moments(top_a, total_a, moment_a, top_b, total_b, moment_b):
    """The same with a sum of weight times direction, in the unit of the total."""
    top, factor_a, factor_b = _factors(top_a, top_b)
    return top, total_a * factor_a + total_b * factor_b, moment_a * factor_a + moment_b * factor_b


@triton.jit
def log_weight(top, total):
    """ln of a weight, -inf of none."""
    nobody = total == 0.0
    return tl.where(nobody, float("-inf"), top + tl.log(tl.where(nobody, 1.0, total)))


@triton.jit
def _ratio(log_part, log_total):
    """e^(log_part - log_total), where an infinite total leaves nothing to its parts."""
    some = (log_part > float("-inf")) & (log_total < float("inf"))
    return tl.where(some, tl.exp(tl.where(some, log_part - log_total, 0.0)), 0.0)


@triton.jit
def _chain(factor_a, sum_a, factor_b, sum_b):
    """Two steps of s = s * factor + sum, as one."""
    return factor_a * factor_b, sum_a * factor_b + sum_b


@triton.jit
def _chain_two(factor_a, sum_a, other_a, factor_b, sum_b, other_b):
    return factor_a * factor_b, sum_a * factor_b + sum_b, other_a * factor_b + other_b


@triton.jit
def _at(values, lane, where):
    """One lane of a float64 block."""
    return tl.sum(tl.where(lane == where, values, 0.0), 0)


@triton.jit(do_not_specialize=["n", "k", "blocks", "rows"])
def _stage_kernel(
    indices, stage, n: tl.int64, k: tl.int64, blocks: tl.int64, rows: tl.int64, sample_stride: tl.int64,
    row_stride: tl.int64, draw_stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) // blocks
    j = tl.program_id(0).to(tl.int64) % blocks * BLOCK + tl.arange(0, BLOCK)
    drawn = indices + item // rows * sample_stride + item % rows * row_stride
    index = tl.load(drawn + j * draw_stride, mask=j < k, other=-1)
    # The first of several: integers, so that no order of the programs changes it.
    tl.atomic_min(stage + item * n + index, j.to(tl.int32), mask=(index >= 0) & (index < n), sem="relaxed")


@triton.jit(do_not_specialize=["n", "k", "rows"])
def _draws_kernel(
    logits, indices, stage, log_prob, direction, grad, scale, grad_grad, totals, means, stays, met,
    n: tl.int64, k: tl.int64, rows: tl.int64, logit_row_stride: tl.int64, logit_stride: tl.int64,
    sample_stride: tl.int64, row_stride: tl.int64, draw_stride: tl.int64, ORDER: tl.constexpr, ITEMS: tl.constexpr,
    DRAWS: tl.constexpr,
):  # fmt: skip
    """One draw: ORDER 0 writes its log-probability, 1 and 2 the tables of as many derivatives."""
    item = tl.program_id(0).to(tl.int64)
    row = item % rows
    logits += row * logit_row_stride
    indices += item // rows * sample_stride + row * row_stride
    stage += item * n
    if ORDER > 0:
        totals += item * (k + 1)
        stays += item * (k + 1)
    if ORDER > 1:
        direction += row * n
        means += item * (k + 1)
        met += item * (k + 1)

    # Who is never drawn stays in the race to the end.
    lane = tl.arange(0, ITEMS)
    tops, weights = tl.full((ITEMS,), NOBODY, tl.float64), tl.zeros((ITEMS,), tl.float64)
    moments, found = tl.zeros((ITEMS,), tl.float64), tl.zeros((ITEMS,), tl.int64)
    for first in range(0, n, ITEMS):
        i = first + lane
        x = load_double(logits + i * logit_stride, i < n)
        drawn_at = tl.load(stage + i, mask=i < n, other=0)
        top, weight = weight_of(tl.where((drawn_at == k) & (x == x), x, float("-inf")))
        if ORDER > 1:
            moment = weight * tl.load(direction + i, mask=i < n, other=0.0)
            tops, weights, moments = _add_moments(tops, weights, moments, top, weight, moment)
        else:
            tops, weights = add_weights(tops, weights, top, weight)
        found += ((i < n) & (drawn_at < k)).to(tl.int64)
    if ORDER > 1:
        last_top, last_weight, last_moment = tl.reduce((tops, weights, moments), 0, _add_moments)
    else:
        last_top, last_weight = tl.reduce((tops, weights), 0, add_weights)
    if ORDER > 0:
        tl.store(totals + k, log_weight(last_top, last_weight))

    # From the last stage to the first the race only gains weight.
    lane = tl.arange(0, DRAWS)
    value, slope = tl.zeros((DRAWS,), tl.float64), tl.zeros((DRAWS,), tl.float64)
    wrong, inside = tl.zeros((DRAWS,), tl.int32), tl.zeros((DRAWS,), tl.int64)
    for after in range(0, k, DRAWS):
        j = k - 1 - after - lane
        index = tl.load(indices + j * draw_stride, mask=j >= 0, other=-1)
        exists = (index >= 0) & (index < n)
        x = load_double(logits + index * logit_stride, exists)
        logit = tl.where(x == x, x, float("-inf"))
        top, weight = weight_of(logit)
        if ORDER > 1:
            towards = tl.load(direction + index, mask=exists, other=0.0)
            top, weight, moment = tl.associative_scan((top, weight, weight * towards), 0, _add_moments)
            top, weight, moment = _add_moments(last_top, last_weight, last_moment, top, weight, moment)
            last_moment = _at(moment, lane, DRAWS - 1)
        else:
            top, weight = tl.associative_scan((top, weight), 0, add_weights)
            top, weight = add_weights(last_top, last_weight, top, weight)
        last_top, last_weight = _at(top, lane, DRAWS - 1), _at(weight, lane, DRAWS - 1)
        total = log_weight(top, weight)
        # -1 is padding, -inf is never drawn, +inf wins for sure.
        chance = (logit > float("-inf")) & (logit < float("inf"))
        value += tl.where(chance, tl.where(chance, logit, 0.0) - total, 0.0)
        undefined = ((index != -1) & (exists == 0)) | (x != x)
        wrong |= tl.where(undefined, 2, tl.where(exists & (logit == float("-inf")), 1, 0))
        inside += exists.to(tl.int64)
        if ORDER > 0:
            tl.store(totals + j, total, mask=j >= 0)
        if ORDER > 1:
            mean = moment / tl.where(weight > 0.0, weight, 1.0)
            tl.store(means + j, mean, mask=j >= 0)
            slope += tl.where(chance & (total < float("inf")), towards - mean, 0.0)
    # An item that is drawn twice has one stage.
    wrong = tl.max(wrong, 0)
    impossible = (wrong == 1) | (tl.sum(inside, 0) > tl.sum(found, 0))
    result = tl.where(wrong >= 2, float("nan"), tl.where(impossible, float("-inf"), tl.sum(value, 0)))
    if ORDER == 0:
        tl.store(log_prob + item, result.to(log_prob.dtype.element_ty))
    else:
        possible = tl.abs(result) < float("inf")
        tl.store(scale + item, tl.where(possible, tl.load(grad + item), 0.0))
        if ORDER > 1:
            tl.store(grad_grad + item, tl.where(possible, tl.sum(slope, 0), 0.0))
        # An item drawn at stage d was in the race at stages 0 to d and won stage j with probability
        # e^(logit - total[j]): together e^(logit - total[d]) * stays[d], where `stays` grows by 1 at most per stage.
        tl.debug_barrier()  # the totals that other threads have written
        last_stays = tl.sum(tl.zeros((DRAWS,), tl.float64), 0)
        last_met = last_stays
        for first in range(0, k + 1, DRAWS):
            j = first + lane
            total = tl.load(totals + j, mask=j <= k, other=float("-inf"))
            before = tl.load(totals + j - 1, mask=(j > 0) & (j <= k), other=float("inf"))
            index = tl.load(indices + j * draw_stride, mask=j < k, other=-1)
            counts = ((index != -1) & (total < float("inf"))).to(tl.float64)
            if ORDER > 1:
                mean = tl.load(means + j, mask=j < k, other=0.0)
                factor, here, here_met = tl.associative_scan(
                    (_ratio(total, before), counts, counts * mean), 0, _chain_two
                )
                here_met += factor * last_met
                last_met = _at(here_met, lane, DRAWS - 1)
                tl.store(met + j, here_met, mask=j <= k)
            else:
                factor, here = tl.associative_scan((_ratio(total, before), counts), 0, _chain)
            here += factor * last_stays
            last_stays = _at(here, lane, DRAWS - 1)
            tl.store(stays + j, here, mask=j <= k)


@triton.jit(do_not_specialize=["samples", "n", "k", "rows", "chunks"])
def _gradient_kernel(
    logits, stage, direction, scale, totals, stays, met, out, samples: tl.int64, n: tl.int64, k: tl.int64,
    rows: tl.int64, chunks: tl.int64, row_stride: tl.int64, stride: tl.int64, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // chunks
    i = tl.program_id(0).to(tl.int64) % chunks * BLOCK + tl.arange(0, BLOCK)
    x = load_double(logits + row * row_stride + i * stride, i < n)
    x = tl.where(x == x, x, float("-inf"))
    total_grad = tl.load(out + row * n + i, mask=i < n, other=0.0)
    if ORDER > 1:
        towards = tl.load(direction + row * n + i, mask=i < n, other=0.0)
    for sample in range(samples):
        item = sample * rows + row
        factor = tl.load(scale + item)
        drawn_at = tl.load(stage + item * n + i, mask=i < n, other=0).to(tl.int64)
        at = item * (k + 1) + drawn_at
        log_total = tl.load(totals + at, mask=i < n, other=0.0)
        met_races = _ratio(x, log_total) * tl.load(stays + at, mask=i < n, other=0.0)
        if ORDER > 1:
            term = _ratio(x, log_total) * tl.load(met + at, mask=i < n, other=0.0) - met_races * towards
        else:
            term = ((drawn_at < k) & (log_total < float("inf"))).to(tl.float64) - met_races
        total_grad += tl.where(factor != 0.0, factor * term, 0.0)
    tl.store(out + row * n + i, total_grad, mask=i < n)


def _size(n: int) -> int:
    return min(block(n), MOST)


def _slices(logits: Tensor, indices: Tensor) -> Iterator[slice]:
    """Ranges of samples whose tables fit into the scratch memory."""
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    step = max(1, SCRATCH // max(rows * (4 * n + 32 * (k + 1)), 1))
    yield from (slice(s, min(s + step, samples)) for s in range(0, samples, step))


def _stages(logits: Tensor, indices: Tensor) -> Tensor:
    """When every item is drawn, `[S, R, N]` int32; k for never."""
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    stage = torch.full((samples, rows, n), k, dtype=torch.int32, device=logits.device)
    size = _size(k)
    blocks = triton.cdiv(k, size)
    launch(
        _stage_kernel, (samples * rows * blocks,), indices, stage, n, k, blocks, rows, *indices.stride(),
        num_warps=max(1, size // 256), BLOCK=size,
    )  # fmt: skip
    return stage


def _draws(logits: Tensor, indices: Tensor, stage: Tensor, order: int, *tables: Tensor | None) -> None:
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    sizes = _size(n), _size(k + (order > 0))
    launch(
        _draws_kernel, (samples * rows,), logits, indices, stage, *tables, n, k, rows, *logits.stride(),
        *indices.stride(), num_warps=max(1, max(sizes) // 256), ORDER=order, ITEMS=sizes[0], DRAWS=sizes[1],
    )  # fmt: skip


def pl_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """ln P of the ordered draws `[S, R, k]` from rows `[R, N]` -> `[S, R]`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_prob = torch.empty(indices.shape[:2], dtype=dtype, device=logits.device)
    for s in _slices(logits, indices):
        _draws(logits, indices[s], _stages(logits, indices[s]), 0, log_prob[s], *[None] * 8)
    return log_prob


def _derivative(
    order: int, direction: Tensor | None, grad: Tensor, logits: Tensor, indices: Tensor, slope: Tensor | None
) -> Tensor:
    """Gradient of the logits `[R, N]` float64 of the first or second order; the second also writes `slope` `[S, R]`."""
    (rows, n), k = logits.shape, indices.shape[2]
    out = torch.zeros(rows, n, dtype=torch.float64, device=logits.device)
    size = _size(n)
    chunks = triton.cdiv(n, size)
    for s in _slices(logits, indices):
        drawn = indices[s]
        samples, stage = drawn.shape[0], _stages(logits, drawn)
        tables = [
            torch.empty(samples, rows, k + 1, dtype=torch.float64, device=logits.device) for _ in range(2 * order)
        ]
        totals, stays, means, met = tables if order > 1 else (*tables, None, None)
        scale = torch.empty(samples, rows, dtype=torch.float64, device=logits.device)
        slope_of = None if slope is None else slope[s]
        _draws(logits, drawn, stage, order, None, direction, grad[s], scale, slope_of, totals, means, stays, met)
        launch(
            _gradient_kernel, (rows * chunks,), logits, stage, direction, scale, totals, stays, met, out, samples, n, k,
            rows, chunks, *logits.stride(), num_warps=max(1, size // 256), ORDER=order, BLOCK=size,
        )  # fmt: skip
    return out


def pl_log_prob_backward(grad: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    """`[S, R]` gradient -> `[R, N]`: a stage adds 1 to its winner and takes each racer's probability."""
    return _derivative(1, None, grad.double().contiguous(), logits, indices, None).to(logits.dtype)


def pl_log_prob_double_backward(
    direction: Tensor, grad: Tensor, logits: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient `[R, N]` of the backward's output -> those of its `grad` `[S, R]` and `logits` `[R, N]`."""
    slope = torch.empty(grad.shape, dtype=torch.float64, device=logits.device)
    towards = direction.double().contiguous()
    found = _derivative(2, towards, grad.double().contiguous(), logits, indices, slope)
    return slope.to(grad.dtype), found.to(logits.dtype)
