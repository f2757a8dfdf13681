"""Exact probabilities of draws without replacement (Plackett-Luce), and tests of samples against them.

Item i is among the first k exactly if fewer than k others arrive before it when item j arrives at an exponential
time of rate w_j. So its inclusion probability is an integral over its arrival time of a Poisson-binomial tail, and
the trapezoid rule in the logarithm of time gives it to 1e-14.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import stats


def _nodes(w: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    log_t = np.linspace(math.log(1e-14 / w.max()), math.log(60 / w.min()), count)
    return np.exp(log_t), log_t[1] - log_t[0]


def _fewer_arrived(arrived: np.ndarray, without: np.ndarray, least: int) -> np.ndarray:
    """P(fewer than `least` of the items arrived), leaving out the items of each row of `without`.

    arrived [Q, N], without [M, e] -> [Q, M].
    """
    nodes, items = arrived.shape
    pmf = np.zeros((least + 1, nodes, len(without)))
    pmf[0] = 1
    for j in range(items):
        p = np.where((without == j).any(1), 0.0, arrived[:, j : j + 1])  # [Q, M]
        pmf[1:] = pmf[1:] * (1 - p) + pmf[:-1] * p
        pmf[0] *= 1 - p
    return pmf[:least].sum(0)


def inclusion(weights: np.ndarray, k: int, nodes: int = 400) -> np.ndarray:
    """[N] probability that an item is among the first k."""
    w = np.asarray(weights, float) / np.sum(weights)
    t, h = _nodes(w, nodes)
    arrived = -np.expm1(-np.outer(t, w))
    density = w * t[:, None] * np.exp(-np.outer(t, w))
    return h * (density * _fewer_arrived(arrived, np.arange(len(w))[:, None], k)).sum(0)


def pair_inclusion(weights: np.ndarray, k: int, nodes: int = 400) -> np.ndarray:
    """[N, N] probability that both items are among the first k; the diagonal is `inclusion`."""
    w = np.asarray(weights, float) / np.sum(weights)
    t, h = _nodes(w, nodes)
    arrived = -np.expm1(-np.outer(t, w))
    density = w * t[:, None] * np.exp(-np.outer(t, w))
    pairs = np.array(list(itertools.combinations(range(len(w)), 2)))
    i, j = pairs.T
    both = density[:, i] * arrived[:, j] + arrived[:, i] * density[:, j]
    joint = np.diag(inclusion(weights, k, nodes))
    if k >= 2:
        joint[i, j] = joint[j, i] = h * (both * _fewer_arrived(arrived, pairs, k - 1)).sum(0)
    return joint


def ordered(weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Probability of every ordered draw of k items."""
    result = {}
    for draw in itertools.permutations(range(len(weights)), k):
        p, rest = 1.0, float(np.sum(weights))
        for item in draw:
            p *= weights[item] / rest
            rest -= weights[item]
        result[draw] = p
    return result


def pair_inclusion_by_enumeration(weights: np.ndarray, k: int) -> np.ndarray:
    """`pair_inclusion` from the sum over all ordered draws, for a few items."""
    joint = np.zeros((len(weights), len(weights)))
    for draw, p in ordered(weights, k).items():
        joint[np.ix_(draw, draw)] += p
    return joint


def ordered_p_value(draws: np.ndarray, weights: np.ndarray) -> float:
    """Chi-square p-value of ordered draws [M, k] over all their outcomes."""
    n, k = len(weights), draws.shape[1]
    code = (draws * n ** np.arange(k)).sum(1)
    outcomes = ordered(weights, k)
    codes = [int(np.dot(draw, n ** np.arange(k))) for draw in outcomes]
    counts = np.bincount(code, minlength=n**k)[codes]
    assert counts.sum() == len(draws)  # no draw outside the support
    expected = np.array(list(outcomes.values())) * len(draws)
    return float(stats.chisquare(counts, expected * len(draws) / expected.sum()).pvalue)


def inclusion_p_value(draws: np.ndarray, joint: np.ndarray) -> float:
    """p-value of the inclusion counts of draws [M, k], whose covariance the pair probabilities give (Hotelling).

    The counts of a draw without replacement depend on each other, so that their plain chi-square is not one.
    """
    n, inclusion_of = len(joint), np.diag(joint)
    counts = np.bincount(draws.ravel(), minlength=n)
    covariance = joint - np.outer(inclusion_of, inclusion_of)
    values, vectors = np.linalg.eigh(covariance)
    free = values > 1e-9 * values.max()  # the counts add up to k
    z = vectors.T @ (counts / len(draws) - inclusion_of)
    return float(stats.chi2.sf(len(draws) * np.sum(z[free] ** 2 / values[free]), free.sum()))


def overlap_p_value(first: np.ndarray, second: np.ndarray, joint: np.ndarray) -> float:
    """p-value of the mean number of items that independent draws [M, k] and [M, k] share."""
    shared = (first[:, :, None] == second[:, None, :]).sum((1, 2))
    inclusion_of = np.diag(joint)
    mean = np.sum(inclusion_of**2)
    variance = np.sum(joint**2) - mean**2
    return float(2 * stats.norm.sf(abs(shared.mean() - mean) / math.sqrt(variance / len(first))))
