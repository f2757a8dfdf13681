"""The probability of ordered draws without replacement, and its derivatives.

The race gains weight from its last stage to its first, so nothing is ever subtracted. A table `stage` says for every
item when it was drawn, k for never; with the weight of the race at each stage it gives every item's gradient in a pass
of its own.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.launch import block, launch
from cacovid_kernels.triton.weights import (
    CERTAIN,
    NOBODY,
    add_moments,
    add_weights,
    aligned,
    last_lane,
    load_double,
    power,
    race_back,
    share,
    weight_of,
)

SCRATCH = 1 << 28  # bytes that the samples of one launch may need
MOST = 512  # elements of a row that a program holds at a time
DRAWS = 256  # stages of a draw that a program holds at a time


@triton.jit
def _chain(factor_a, sum_a, factor_b, sum_b):
    """Two steps of s = s * factor + sum, as one."""
    return factor_a * factor_b, sum_a * factor_b + sum_b


@triton.jit
def _chain_two(factor_a, sum_a, other_a, factor_b, sum_b, other_b):
    return factor_a * factor_b, sum_a * factor_b + sum_b, other_a * factor_b + other_b


@triton.jit(do_not_specialize=["n", "k", "blocks", "rows", "sample_stride", "row_stride"])
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


@triton.jit(do_not_specialize=["n", "k", "rows", "chunks", "row_stride"])
def _undrawn_kernel(
    logits, stage, direction, undrawn, n: tl.int64, k: tl.int64, rows: tl.int64, chunks: tl.int64, row_stride: tl.int64,
    stride: tl.int64, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exponent, total and moment of the weight in a chunk that stays in the race to the end; how many do not."""
    item = tl.program_id(0).to(tl.int64) // chunks
    row = item % rows
    i = tl.program_id(0).to(tl.int64) % chunks * BLOCK + tl.arange(0, BLOCK)
    x = load_double(logits + row * row_stride + i * stride, i < n)
    drawn_at = tl.load(stage + item * n + i, mask=i < n, other=0)
    exponent, total = weight_of(tl.where((drawn_at == k) & (x == x), x, float("-inf")))
    out = undrawn + tl.program_id(0).to(tl.int64) * 4
    exponent, total = aligned(exponent, total)
    tl.store(out, exponent)
    tl.store(out + 1, tl.sum(total, 0))
    if ORDER > 1:
        tl.store(out + 2, tl.sum(total * tl.load(direction + row * n + i, mask=i < n, other=0.0), 0))
    tl.store(out + 3, tl.sum(((i < n) & (drawn_at < k)).to(tl.int32), 0).to(tl.float64))


@triton.jit(do_not_specialize=["n", "k", "rows", "chunks", "logit_row_stride", "sample_stride", "row_stride"])
def _draws_kernel(
    logits, indices, undrawn, log_prob, direction, grad, scale, grad_grad, exponents, totals, means, stays, met,
    n: tl.int64, k: tl.int64, rows: tl.int64, chunks: tl.int64, logit_row_stride: tl.int64, logit_stride: tl.int64,
    sample_stride: tl.int64, row_stride: tl.int64, draw_stride: tl.int64, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One draw: ORDER 0 writes its log-probability, 1 and 2 the tables of as many derivatives."""
    item = tl.program_id(0).to(tl.int64)
    row = item % rows
    logits += row * logit_row_stride
    indices += item // rows * sample_stride + row * row_stride
    undrawn += item * chunks * 4
    if ORDER > 0:
        exponents += item * (k + 1)
        totals += item * (k + 1)
        stays += item * (k + 1)
    if ORDER > 1:
        direction += row * n
        means += item * (k + 1)
        met += item * (k + 1)
    lane = tl.arange(0, BLOCK)
    exponent, total = tl.full((BLOCK,), NOBODY, tl.float64), tl.zeros((BLOCK,), tl.float64)
    moment, drawn = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks, BLOCK):
        at, live = undrawn + (first + lane) * 4, first + lane < chunks
        part_exponent, part = tl.load(at, mask=live, other=NOBODY), tl.load(at + 1, mask=live, other=0.0)
        if ORDER > 1:
            part_moment = tl.load(at + 2, mask=live, other=0.0)
            exponent, total, moment = add_moments(exponent, total, moment, part_exponent, part, part_moment)
        else:
            exponent, total = add_weights(exponent, total, part_exponent, part)
        drawn += tl.load(at + 3, mask=live, other=0.0)
    last_exponent, total = aligned(exponent, total)
    moment *= power(exponent - last_exponent)
    if ORDER > 0:
        tl.store(exponents + k, last_exponent)
        tl.store(totals + k, tl.sum(total, 0))
    value, slope, inside, wrong = race_back(
        logits, indices, direction, exponents, totals, means, n, k, logit_stride, draw_stride,
        last_exponent, tl.sum(total, 0), tl.sum(moment, 0), ORDER, BLOCK,
    )  # fmt: skip
    impossible = (wrong == 1) | (inside > tl.sum(drawn, 0))  # an item drawn twice has one stage
    result = tl.where(wrong >= 2, float("nan"), tl.where(impossible, float("-inf"), value))
    if ORDER == 0:
        tl.store(log_prob + item, result.to(log_prob.dtype.element_ty))
    else:
        possible = tl.abs(result) < float("inf")
        tl.store(scale + item, tl.where(possible, tl.load(grad + item), 0.0))
        if ORDER > 1:
            tl.store(grad_grad + item, tl.where(possible, slope, 0.0))
        # An item drawn at stage d was in the race at stages 0 to d and won stage j with probability
        # weight / total[j]: together weight / total[d] * stays[d], where `stays` grows by 1 at most per stage.
        tl.debug_barrier()  # the totals that other threads have written
        last_stays = tl.sum(tl.zeros((BLOCK,), tl.float64), 0)
        last_met = last_stays
        for first in range(0, k + 1, BLOCK):
            j = first + lane
            exponent = tl.load(exponents + j, mask=j <= k, other=NOBODY)
            total = tl.load(totals + j, mask=j <= k, other=0.0)
            exponent_before = tl.load(exponents + j - 1, mask=(j > 0) & (j <= k), other=CERTAIN)
            total_before = tl.load(totals + j - 1, mask=(j > 0) & (j <= k), other=1.0)
            carry = share(exponent, total, exponent_before, total_before)
            index = tl.load(indices + j * draw_stride, mask=j < k, other=-1)
            counts = ((index != -1) & (exponent < CERTAIN)).to(tl.float64)
            if ORDER > 1:
                steps = carry, counts, counts * tl.load(means + j, mask=j < k, other=0.0)
                factor, here, here_met = tl.associative_scan(steps, 0, _chain_two)
                here_met += factor * last_met
                last_met = last_lane(here_met, lane, BLOCK)
                tl.store(met + j, here_met, mask=j <= k)
            else:
                factor, here = tl.associative_scan((carry, counts), 0, _chain)
            here += factor * last_stays
            last_stays = last_lane(here, lane, BLOCK)
            tl.store(stays + j, here, mask=j <= k)


@triton.jit(do_not_specialize=["samples", "n", "k", "rows", "chunks", "row_stride"])
def _gradient_kernel(
    logits, stage, direction, scale, exponents, totals, stays, met, out, samples: tl.int64, n: tl.int64, k: tl.int64,
    rows: tl.int64, chunks: tl.int64, row_stride: tl.int64, stride: tl.int64, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // chunks
    i = tl.program_id(0).to(tl.int64) % chunks * BLOCK + tl.arange(0, BLOCK)
    x = load_double(logits + row * row_stride + i * stride, i < n)
    part_exponent, part = weight_of(tl.where(x == x, x, float("-inf")))
    total_grad = tl.load(out + row * n + i, mask=i < n, other=0.0)
    if ORDER > 1:
        towards = tl.load(direction + row * n + i, mask=i < n, other=0.0)
    for sample in range(samples):
        item = sample * rows + row
        factor = tl.load(scale + item)
        drawn_at = tl.load(stage + item * n + i, mask=i < n, other=0).to(tl.int64)
        at = item * (k + 1) + drawn_at
        exponent = tl.load(exponents + at, mask=i < n, other=CERTAIN)
        chance = share(part_exponent, part, exponent, tl.load(totals + at, mask=i < n, other=0.0))
        races = chance * tl.load(stays + at, mask=i < n, other=0.0)
        if ORDER > 1:
            term = chance * tl.load(met + at, mask=i < n, other=0.0) - races * towards
        else:
            term = ((drawn_at < k) & (exponent < CERTAIN)).to(tl.float64) - races
        total_grad += tl.where(factor != 0.0, factor * term, 0.0)
    tl.store(out + row * n + i, total_grad, mask=i < n)


def _size(n: int) -> int:
    return min(block(n), MOST)


def _warps(size: int) -> int:
    """Four pairs of float64 a thread: more would spill registers."""
    return max(1, size // 128)


def _slices(logits: Tensor, indices: Tensor) -> Iterator[slice]:
    """Ranges of samples whose tables fit into the scratch memory."""
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    step = max(1, SCRATCH // max(rows * (4 * n + 40 * (k + 1)), 1))
    yield from (slice(s, min(s + step, samples)) for s in range(0, samples, step))


def _table(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _stages(logits: Tensor, indices: Tensor) -> Tensor:
    """When every item is drawn, `[S, R, N]` int32; k for never."""
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    stage = torch.full((samples, rows, n), k, dtype=torch.int32, device=logits.device)
    size = _size(k)
    blocks = triton.cdiv(k, size)
    launch(
        _stage_kernel, (samples * rows * blocks,), indices, stage, n, k, blocks, rows, *indices.stride(),
        num_warps=_warps(size), BLOCK=size,
    )  # fmt: skip
    return stage


def _draws(
    order: int, logits: Tensor, indices: Tensor, stage: Tensor, direction: Tensor | None, **tables: Tensor
) -> None:
    """Fills `log_prob` or the tables of as many derivatives as `order` says."""
    (rows, n), (samples, _, k) = logits.shape, indices.shape
    size = _size(n)
    chunks = triton.cdiv(n, size)
    undrawn = _table(samples, rows, chunks, 4, like=logits)
    launch(
        _undrawn_kernel, (samples * rows * chunks,), logits, stage, direction, undrawn, n, k, rows, chunks,
        *logits.stride(), num_warps=_warps(size), ORDER=order, BLOCK=size,
    )  # fmt: skip
    names = "grad", "scale", "grad_grad", "exponents", "totals", "means", "stays", "met"
    size = min(block(k + 1), DRAWS)
    launch(
        _draws_kernel, (samples * rows,), logits, indices, undrawn, tables.get("log_prob"), direction,
        *(tables.get(name) for name in names), n, k, rows, chunks, *logits.stride(), *indices.stride(),
        num_warps=max(1, size // 32), maxnreg=128, ORDER=order, BLOCK=size,
    )  # fmt: skip


def pl_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """ln P of the ordered draws `[S, R, k]` from rows `[R, N]` -> `[S, R]`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_prob = torch.empty(indices.shape[:2], dtype=dtype, device=logits.device)
    for s in _slices(logits, indices):
        _draws(0, logits, indices[s], _stages(logits, indices[s]), None, log_prob=log_prob[s])
    return log_prob


def _derivative(
    order: int, direction: Tensor | None, grad: Tensor, logits: Tensor, indices: Tensor, grad_grad: Tensor | None
) -> Tensor:
    """Gradient `[R, N]` float64 of the first or second order; the second also writes `grad_grad` `[S, R]`."""
    (rows, n), k = logits.shape, indices.shape[2]
    out = torch.zeros(rows, n, dtype=torch.float64, device=logits.device)
    size = _size(n)
    chunks = triton.cdiv(n, size)
    names = ("exponents", "totals", "stays", "means", "met")[: 1 + 2 * order]
    for s in _slices(logits, indices):
        samples, stage = indices[s].shape[0], _stages(logits, indices[s])
        tables = {name: _table(samples, rows, k + 1, like=out) for name in names}
        tables["scale"] = _table(samples, rows, like=out)
        if grad_grad is not None:
            tables["grad_grad"] = grad_grad[s]
        _draws(order, logits, indices[s], stage, direction, grad=grad[s], **tables)
        launch(
            _gradient_kernel, (rows * chunks,), logits, stage, direction, tables["scale"], tables["exponents"],
            tables["totals"], tables["stays"], tables.get("met"), out, samples, n, k, rows, chunks, *logits.stride(),
            num_warps=_warps(size), ORDER=order, BLOCK=size,
        )  # fmt: skip
    return out


def pl_log_prob_backward(grad: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    """`[S, R]` gradient -> `[R, N]`: a stage adds 1 to its winner and takes each racer's probability."""
    return _derivative(1, None, grad.double().contiguous(), logits, indices, None).to(logits.dtype)


def pl_log_prob_double_backward(
    direction: Tensor, grad: Tensor, logits: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient `[R, N]` of the backward's output -> those of its `grad` `[S, R]` and `logits` `[R, N]`."""
    grad_grad = _table(*grad.shape, like=logits)
    towards = direction.double().contiguous()
    found = _derivative(2, towards, grad.double().contiguous(), logits, indices, grad_grad)
    return grad_grad.to(grad.dtype), found.to(logits.dtype)
