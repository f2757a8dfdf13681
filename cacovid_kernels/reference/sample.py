"""Gumbel top-k and Plackett-Luce log-probabilities: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cacovid_kernels.reference.exact import order_key
from cacovid_kernels.reference.random import gumbel_noise, random_bits, step_of

NAN, POSINF, SHORT = 1, 2, 4


def row_status(scores: Tensor) -> Tensor:
    """Status bits of every row, int32 `[..., N]` -> `[...]`."""
    nan, posinf = torch.isnan(scores).any(-1), (scores == math.inf).any(-1)
    return (nan * NAN + posinf * POSINF).int()


def draw(scores: Tensor, noise: Tensor, k: int) -> Tensor:
    """Positions `[..., k]` of the k largest of score + noise, the winner first, ties to the lower position.

    Scores of -inf and NaN have no chance; -1 pads where fewer than k have one.
    """
    chance = scores > -math.inf
    key = torch.where(chance, order_key(scores + noise), 0)  # [..., N]
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.where(chance.gather(-1, order), order, -1)


def gumbel_topk(
    logits: Tensor, k: int, num_samples: int, seed: int, step: int, added_steps: Tensor | None, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices `[S, R, k]` int64 in draw order, their log-probability `[S, R]` float32, status `[R]` int32."""
    rows, columns = logits.shape
    row = torch.arange(rows, device=logits.device)[:, None]
    column = torch.arange(columns, device=logits.device)
    drawn = [logits.new_empty(0, rows, k, dtype=torch.int64)]
    for s in range(num_samples):
        bits = random_bits(column, row, torch.full_like(row, s), seed, step_of(step, added_steps), stream)  # [R, N]
        drawn.append(draw(logits.float(), gumbel_noise(bits), k)[None])
    indices = torch.cat(drawn)  # [S, R, k]
    valid = (logits > -math.inf).sum(-1)  # [R]
    status = row_status(logits) | torch.where(valid < k, SHORT, 0).int()
    return indices, pl_log_prob(logits, indices).float(), status


class _Race:
    """Ordered draws as races of which every stage has one winner, who leaves. All in float64."""

    def __init__(self, logits: Tensor, indices: Tensor) -> None:
        samples, (rows, columns) = indices.shape[0], logits.shape
        self.items = logits.double().masked_fill(torch.isnan(logits), -math.inf)  # [R, N]
        used = indices != -1
        inside = (indices >= 0) & (indices < columns)
        at = torch.where(inside, indices, columns)  # [S, R, k]
        padded = torch.nn.functional.pad(logits.double(), (0, 1), value=-math.inf)
        self.winner = padded.expand(samples, -1, -1).gather(-1, at)  # [S, R, k]
        drawn_nan = torch.isnan(self.winner)
        self.winner = self.winner.masked_fill(drawn_nan, -math.inf)
        times = torch.zeros(samples, rows, columns + 1, dtype=torch.int64, device=logits.device)
        times = times.scatter_add(-1, at, torch.ones_like(at))[..., :columns]  # [S, R, N]
        undrawn = self.items.masked_fill(times > 0, -math.inf).logsumexp(-1, keepdim=True)  # [S, R, 1]
        # From the last stage to the first the race only gains weight: nothing is ever subtracted.
        totals = torch.cat([undrawn, self.winner.flip(-1)], -1).logcumsumexp(-1).flip(-1)[..., :-1]
        certain = self.winner == math.inf
        term = torch.where(used & ~certain, self.winner - totals, 0.0)
        impossible = (used & (self.winner == -math.inf)).any(-1) | (times > 1).any(-1)
        undefined = ((used & ~inside) | drawn_nan).any(-1)
        value = term.sum(-1).masked_fill(impossible, -math.inf)
        self.log_prob = value.masked_fill(undefined, math.nan)  # [S, R]
        self.possible = torch.isfinite(self.log_prob)
        # A stage counts where it has a winner and chance decides it.
        self.counts = used & (totals < math.inf) & self.possible[..., None]  # [S, R, k]
        self.totals, self.at = totals, at

    def stages(self):
        """For every stage: who wins, `[S, R, N]` bool, and each item's probability of it, `[S, R, N]`."""
        columns = torch.arange(self.items.shape[-1], device=self.items.device)
        racing = (self.items > -math.inf).expand(*self.log_prob.shape, -1)  # [S, R, N]
        for j in range(self.at.shape[-1]):
            wins = self.at[..., j, None] == columns
            share = (self.items - self.totals[..., j, None]).exp()
            runs = racing & self.counts[..., j, None]
            yield wins & runs, torch.where(runs, share, 0.0)
            racing = racing & ~wins


def pl_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """ln P of the ordered draws `[S, R, k]` from rows `[R, N]` -> `[S, R]`: the sum over stages of
    logit of the winner - ln sum exp(logits still in the race)."""
    value = _Race(logits, indices).log_prob
    return value if logits.dtype == torch.float64 else value.float()


def pl_log_prob_backward(grad: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    """`[S, R]` gradient -> `[R, N]`: a stage adds 1 to its winner and takes each racer's probability."""
    race = _Race(logits, indices)
    total = torch.zeros_like(race.items)
    scale = torch.where(race.possible, grad.double(), 0.0)[..., None]  # [S, R, 1]
    for wins, share in race.stages():
        total += (scale * (wins.double() - share)).sum(0)
    return total.to(logits.dtype)


def pl_log_prob_double_backward(
    direction: Tensor, grad: Tensor, logits: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient `[R, N]` of the backward's output -> those of its `grad` `[S, R]` and `logits` `[R, N]`."""
    race = _Race(logits, indices)
    towards = direction.double()
    grad_grad = torch.zeros_like(race.log_prob)
    grad_logits = torch.zeros_like(race.items)
    scale = torch.where(race.possible, grad.double(), 0.0)[..., None]
    for wins, share in race.stages():
        mean = (share * towards).sum(-1, keepdim=True)  # [S, R, 1]: of the direction over the race
        grad_grad += ((wins.double() - share) * towards).sum(-1)
        grad_logits -= (scale * share * (towards - mean)).sum(0)
    return grad_grad.to(grad.dtype), grad_logits.to(logits.dtype)
