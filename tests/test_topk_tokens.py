"""The best tokens of whole videos: what torch.topk finds, frame counts, status, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cacovid_kernels as ck

GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


@given(GRIDS, st.floats(0.01, 1.0), st.sampled_from(["index", "score"]), st.integers(0, 2**32 - 1))
def test_it_is_a_stable_sort_of_every_video(grid, ratio, order, seed):
    sizes = [t * h * w for t, h, w in grid]
    scores = torch.randint(0, 6, (sum(sizes),), generator=torch.Generator().manual_seed(seed)).float()
    kept = ck.topk_tokens(scores, grid, keep_ratio=ratio, order=order)
    start, expected = 0, []
    for size in sizes:
        best = scores[start : start + size].sort(descending=True, stable=True).indices
        best = best[: max(int(size * ratio), 1)] + start
        expected.append(best.sort().values if order == "index" else best)
        start += size
    assert kept.lengths == tuple(len(x) for x in expected)
    assert kept.indices.tolist() == torch.cat(expected).tolist()
    frame, place = kept.positions()[0], 0
    for video, (t, _, _) in zip(frame.split(list(kept.lengths)), grid, strict=True):
        assert kept.frame_counts[place : place + t].tolist() == video.bincount(minlength=t).tolist()
        place += t
    assert kept.frame_counts.shape == kept.frame_status.shape == (place,)


def test_dense_scores_need_no_grid():
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense, packed = (
        ck.topk_tokens(scores, num_tokens=4),
        ck.topk_tokens(scores.flatten(), [(3, 1, 5)] * 2, num_tokens=4),
    )
    assert torch.equal(dense.indices, packed.indices)
    assert dense.lengths == (4, 4)


def test_odd_scores_are_flagged():
    scores = torch.zeros(2, 2, 3)
    scores[1, 0, 1] = float("nan")
    kept = ck.topk_tokens(scores, num_tokens=5)
    assert kept.status.tolist() == [0, int(ck.Status.NAN)]
    assert 7 not in kept.indices
    with pytest.raises(ValueError, match="topk_tokens: video 1"):
        ck.topk_tokens(scores, num_tokens=5, check="raise")


def test_no_video():
    kept = ck.topk_tokens(torch.zeros(0), [], keep_ratio=0.5)
    assert (kept.lengths, kept.indices.shape, kept.frame_counts.shape) == ((), (0,), (0,))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "exactly one of keep_ratio and num_tokens"),
        ({"num_tokens": 13}, "num_tokens=13 must be in"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"num_tokens": 1, "grid_thw": [(2, 2, 2)]}, "the 8 tokens"),
        ({"num_tokens": 1, "order": "best"}, "order='best'"),
        ({"num_tokens": 1, "check": "no"}, "check='no'"),
    ],
)
def test_refused(arguments, words):
    with pytest.raises(ValueError, match=words) as refused:
        ck.topk_tokens(torch.zeros(3, 4), **arguments)
    assert str(refused.value).startswith("topk_tokens: ")
    assert "\n" not in str(refused.value)


def test_it_compiles_whole():
    scores = torch.randn(2, 3, 5)
    compiled = torch.compile(lambda x: ck.topk_tokens(x, num_tokens=4).indices, fullgraph=True)
    assert torch.equal(compiled(scores), ck.topk_tokens(scores, num_tokens=4).indices)
