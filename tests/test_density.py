"""Density peaks against the published code's vectors, a plain loop, and the rules of the contract."""

from __future__ import annotations

import math

import pytest
import torch
from common import golden

from cacovid_kernels.compressors.density import density_peaks


@pytest.mark.parametrize("vector", golden("content"))
def test_published_choices(vector):
    features, mask = torch.from_numpy(vector["features"]), torch.from_numpy(vector["mask"])
    chosen = density_peaks(features, int(vector["k"]))
    assert chosen.tolist() == mask.nonzero().flatten().tolist()


def _by_hand(features: torch.Tensor, k: int, neighbors: int) -> list[int]:
    """One frame, one pair of tokens at a time, in float64."""
    points = features.double()
    size, dim = points.shape
    distance = [[float((points[i] - points[j]).norm()) / dim**0.5 for j in range(size)] for i in range(size)]
    density = [math.exp(-sum(d * d for d in sorted(row)[:neighbors]) / neighbors) for row in distance]
    farthest = max(max(row) for row in distance)
    parent = [
        min((distance[i][j] for j in range(size) if density[j] > density[i]), default=farthest) for i in range(size)
    ]
    order = sorted(range(size), key=lambda i: (-parent[i] * density[i], i))
    return sorted(order[:k])


@pytest.mark.parametrize("size, dim, k, neighbors", [(9, 4, 3, 4), (30, 8, 5, 3), (26, 3, 26, 1), (12, 5, 4, 99)])
def test_every_frame_as_by_hand(size, dim, k, neighbors):
    features = torch.randn(2, 3, size, dim)
    chosen = density_peaks(features, k, num_neighbors=neighbors)
    assert chosen.shape == (2, 3, k)
    for b in range(2):
        for t in range(3):
            expected = _by_hand(features[b, t], k, min(neighbors, size))
            assert chosen[b, t].tolist() == expected
            assert density_peaks(features[b, t], k, num_neighbors=neighbors).tolist() == expected


def test_equal_tokens_go_to_the_lower_index():
    assert density_peaks(torch.ones(2, 6, 4), 2).tolist() == [[0, 1], [0, 1]]


def test_a_nan_token_ranks_last_and_stays_in_its_frame():
    features = torch.randn(2, 8, 4)
    clean = density_peaks(features, 3)
    features[0, 2] = float("nan")
    chosen = density_peaks(features, 3)
    assert chosen[1].tolist() == clean[1].tolist()
    assert ((chosen[0] >= 0) & (chosen[0] < 8)).all()


def test_nothing_and_everything():
    features = torch.randn(3, 5, 4)
    assert density_peaks(features, 0).shape == (3, 0)
    assert density_peaks(features, 5).tolist() == [list(range(5))] * 3
    assert density_peaks(features[:0], 2).shape == (0, 2)
    assert density_peaks(features[:, :0], 0).shape == (3, 0)


def test_halves_are_computed_in_float32():
    features = torch.randn(4, 30, 8).bfloat16()
    assert torch.equal(density_peaks(features, 6), density_peaks(features.float(), 6))


@pytest.mark.parametrize(
    "features, k, options, words",
    [
        (torch.zeros(4), 1, {}, r"\[\.\.\., P, D\]"),
        (torch.zeros(4, 2, dtype=torch.int64), 1, {}, "floating"),
        (torch.zeros(4, 2), 5, {}, r"k=5 must be in \[0, P=4\]"),
        (torch.zeros(4, 2), -1, {}, "k=-1"),
        (torch.zeros(4, 2), 1, {"num_neighbors": 0}, "num_neighbors=0"),
    ],
)
def test_errors(features, k, options, words):
    with pytest.raises(ValueError, match=words):
        density_peaks(features, k, **options)
