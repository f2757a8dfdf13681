"""Samples against exact probabilities, with fixed seeds: a right sampler passes every time.

Power, p-value at 200,000 draws of 8 from 32: a temperature off by 2% gives 1e-80 in the inclusion test, every row
repeated four times 1e-17. It is blind to noise of 11 or 16 bits; the rare-event test sees those. The last tests here
make such mistakes on purpose.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from common import golden
from sampling_theory import (
    inclusion,
    inclusion_p_value,
    ordered_p_value,
    overlap_p_value,
    pair_inclusion,
    pair_inclusion_by_enumeration,
)
from scipy import stats

import cacovid_kernels as ck
from cacovid_kernels.ops.combinations import _sample_combinations
from cacovid_kernels.reference.combinations import frame_weights

LEAST_P = 1e-4
DRAWS = 200_000
SOURCES = ["sample", "row", "step", "seed", "stream"]


def logits_of(n: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)) * scale


def weights_of(logits: torch.Tensor) -> np.ndarray:
    return logits.double().exp().numpy()


def draws_from(source: str, logits: torch.Tensor, k: int, count: int) -> np.ndarray:
    """`count` draws [count, k] that differ in one part of their name only (streams: also in their sample)."""
    if source == "sample":
        return ck.gumbel_topk(logits, k, num_samples=count, seed=1).indices.numpy()
    if source == "row":
        return ck.gumbel_topk(logits.expand(count, -1), k, seed=1).indices.numpy()
    if source == "step":
        return torch.stack([ck.gumbel_topk(logits, k, seed=1, step=i).indices for i in range(count)]).numpy()
    if source == "seed":
        return torch.stack([ck.gumbel_topk(logits, k, seed=i << 20).indices for i in range(count)]).numpy()
    per_stream = -(-count // 240)
    found = [ck.gumbel_topk(logits, k, num_samples=per_stream, seed=1, stream=i).indices for i in range(240)]
    return torch.stack(found, 1).reshape(-1, k)[:count].numpy()


@pytest.fixture(scope="module")
def joint():
    """Pair probabilities of 8 of 32."""
    return pair_inclusion(weights_of(logits_of(32)), 8)


# ---- the theory ---------------------------------------------------------------------------------


def test_integrals_equal_enumeration():
    w = weights_of(logits_of(7, 1.2))
    exact = pair_inclusion_by_enumeration(w, 3)
    assert np.abs(pair_inclusion(w, 3) - exact).max() < 1e-12
    assert np.abs(inclusion(w, 3) - np.diag(exact)).max() < 1e-12


def test_pair_probabilities_add_up(joint):
    assert abs(np.trace(joint) - 8) < 1e-10
    assert np.abs(joint.sum(1) - 8 * np.diag(joint)).max() < 1e-10


# ---- gumbel_topk --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_ordered_draws(source):
    logits = logits_of(6)
    count = 20_000 if source in ("step", "seed") else DRAWS
    assert ordered_p_value(draws_from(source, logits, 3, count), weights_of(logits)) > LEAST_P


def test_inclusion_and_pairs(joint):
    draws = draws_from("sample", logits_of(32), 8, DRAWS)
    assert inclusion_p_value(draws, joint) > LEAST_P
    both = np.zeros((32, 32))
    np.add.at(both, (draws[:, :, None], draws[:, None, :]), 1)
    deviation = both / DRAWS - joint
    z = np.abs(deviation) / np.sqrt(joint * (1 - joint) / DRAWS)
    assert z.max() < stats.norm.isf(LEAST_P / (2 * 32 * 33 / 2))


def test_inclusion_of_low_precision_logits():
    logits = logits_of(32).bfloat16()
    exact = pair_inclusion(weights_of(logits.float()), 8)
    assert inclusion_p_value(draws_from("sample", logits, 8, DRAWS), exact) > LEAST_P


def miss_p_value(misses: int, count: int) -> float:
    """Of the draws of one among 256 where the first is 12 above the others."""
    return float(stats.binomtest(misses, count, 255 / (255 + math.exp(12))).pvalue)


def test_rare_events():
    logits = torch.zeros(256)
    logits[0] = 12.0
    draws = draws_from("sample", logits, 1, 1_000_000)
    assert miss_p_value(int((draws != 0).sum()), len(draws)) > LEAST_P


@pytest.mark.parametrize("source", SOURCES)
def test_neighbours_are_independent(source, joint):
    draws = draws_from(source, logits_of(32), 8, 20_000 if source in ("step", "seed") else DRAWS)
    assert overlap_p_value(draws[0::2], draws[1::2], joint) > LEAST_P


def test_parts_of_the_name_are_not_interchangeable(joint):
    logits = logits_of(32)
    of = {source: draws_from(source, logits, 8, 20_001)[1:] for source in SOURCES}  # the first is the same for most
    for first, second in itertools.combinations(SOURCES, 2):
        assert overlap_p_value(of[first], of[second], joint) > LEAST_P, (first, second)


def test_no_draw_repeats():
    draws = draws_from("row", torch.zeros(64), 8, 100_000)
    assert len(np.unique(draws, axis=0)) == 100_000  # a pair agrees with probability 1.6e-5


def test_log_prob_is_that_of_the_draw():
    sample = ck.gumbel_topk(logits_of(6), 3, num_samples=DRAWS, seed=5)
    # The mean of 1 / P over draws is the number of outcomes.
    inverse = (-sample.log_prob.double()).exp()
    outcomes = 6 * 5 * 4
    assert abs(inverse.mean() - outcomes) < 5 * inverse.std() / math.sqrt(DRAWS)


# ---- sample_combinations ------------------------------------------------------------------------


@pytest.mark.parametrize("vector", golden("combination_space"))
def test_groups_and_tokens_follow_the_published_probabilities(vector):
    logits, group_prob = torch.from_numpy(vector["logits"]), vector["group_prob"].astype(float)
    within = vector["within_group_prob"].astype(float)
    tokens, groups, cap = len(logits), int(vector["num_groups"]), float(vector["max_group_prob"])
    k = 1 if tokens // groups > 32 else min(tokens // groups // 2, 4)  # pairs of many tokens take long to integrate
    grid, count = [1, 1, tokens], DRAWS // 2
    args = logits, None, grid, count + 1, [k], [groups], cap * groups, 0, [1], True, 11, 0, None
    indices, drawn, *_ = _sample_combinations(*args)
    picked, drawn = indices[1:].numpy(), drawn[1:, 0].numpy()
    counts = np.bincount(drawn, minlength=groups)
    expected = group_prob / group_prob.sum() * count
    p_values = [stats.chisquare(counts, expected).pvalue] if groups > 1 else []
    for g in range(groups):
        (members,) = within[g].nonzero()
        ranks = np.searchsorted(members, picked[drawn == g])
        assert np.isin(picked[drawn == g], members).all()
        small = len(members) <= 8
        exact = (pair_inclusion_by_enumeration if small else pair_inclusion)(within[g][members], k)
        p_values.append(inclusion_p_value(ranks, exact))
    assert min(p_values) > LEAST_P / len(p_values)
    assert stats.kstest(p_values, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("strict", [False, True])
def test_frames_follow_their_weights(strict):
    scores = logits_of(24, 1.5)
    weights = frame_weights(scores, 8, strict).double().numpy()
    draws = [
        _sample_combinations(torch.zeros(24), scores, [24, 1, 1], 1, [1], [1], 1.0, 8, [3], strict, 12, step, None)[3][
            1:
        ]
        for step in range(4000)
    ]
    assert inclusion_p_value(torch.cat(draws).numpy(), pair_inclusion(weights, 3)) > LEAST_P


def test_frames_of_a_video_are_drawn_independently():
    logits = logits_of(64)
    scores = logits.expand(4000, -1).reshape(-1)
    _, groups, *_ = _sample_combinations(scores, None, [4000, 8, 8], 26, [4], [8], 2.0, 0, [1], True, 13, 0, None)
    drawn = groups[1:].numpy()  # [25, 4000]
    for first, second in ((drawn[:, 0::2], drawn[:, 1::2]), (drawn[0:24:2], drawn[1:24:2])):
        table = np.zeros((8, 8))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        assert stats.chi2_contingency(table).pvalue > LEAST_P


# ---- mistakes that the tests above must see -----------------------------------------------------


def torch_draws(logits: torch.Tensor, k: int, count: int) -> np.ndarray:
    u = torch.rand(count, len(logits), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return (logits.double() - (-u.log()).log()).topk(k).indices.numpy()


def test_a_temperature_off_by_two_percent_is_seen(joint):
    assert inclusion_p_value(torch_draws(logits_of(32) / 1.02, 8, 100_000), joint) < 1e-20
    assert inclusion_p_value(torch_draws(logits_of(32), 8, 100_000), joint) > LEAST_P


def test_repeated_rows_are_seen(joint):
    draws = np.repeat(torch_draws(logits_of(32), 8, 50_000), 4, axis=0)
    assert inclusion_p_value(draws, joint) < 1e-6
    assert overlap_p_value(draws[0::2], draws[1::2], joint) < 1e-100


@pytest.mark.parametrize(("bits", "seen"), [(11, True), (16, True), (32, False)])
def test_coarse_noise_is_seen(bits, seen):
    random = np.random.default_rng(bits)

    def noise(u: np.ndarray) -> np.ndarray:  # rounding keeps the order: the largest stays the largest
        return -np.log(-np.log((np.floor(u * 2.0**bits) + 0.5) * 2.0**-bits))

    best = noise(random.random(1_000_000) ** (1 / 255))  # of the 255 others
    misses = int((noise(random.random(1_000_000)) + 12 < best).sum())
    assert (miss_p_value(misses, 1_000_000) < 1e-8) == seen
