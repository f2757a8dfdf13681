"""Published compressors: the same tokens as their published code, exact counts, batches as one by one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cacovid_kernels.compressors import divprune, evs, fastv, vidcom2
from cacovid_kernels.compressors.vidcom2 import scores_and_shares

GOLDEN = sorted((Path(__file__).parent / "data" / "compressors").glob("*.npz"))
RULES = (divprune, evs, vidcom2)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("ratio", ["0.1", "0.25"])
def test_divprune_chooses_as_published(golden, ratio):
    expected = golden[f"divprune_keep_{ratio}"]
    assert torch.equal(divprune(golden["features"], len(expected), order="score"), expected)
    assert torch.equal(divprune(golden["features"], len(expected)), expected.sort().values)


@pytest.mark.parametrize("ratio", ["0.5", "0.75"])
def test_evs_keeps_as_published(golden, ratio):
    expected = golden[f"evs_keep_{ratio}"]
    assert torch.equal(evs(golden["features"], len(expected)), expected)


@pytest.mark.parametrize("ratio", [0.15, 0.25])
def test_vidcom2_ranks_and_shares_as_published(golden, ratio):
    features, expected = golden["features"], golden[f"vidcom2_keep_{ratio}"]
    frames, places, _ = features.shape
    likeness, shares = scores_and_shares(features, ratio)
    counts = (shares * places).round().long()
    assert torch.equal(counts, torch.bincount(expected // places, minlength=frames))
    kept = [likeness[t].topk(int(c), largest=False).indices.sort().values + t * places for t, c in enumerate(counts)]
    assert torch.equal(torch.cat(kept), expected)
    # With the published total, exact budgets differ from the rounded ones by at most one token per frame.
    exact = vidcom2(features, len(expected))
    assert (torch.bincount(exact // places, minlength=frames) - counts).abs().max() <= 1


def test_fastv_is_the_last_row_of_attention():
    torch.manual_seed(0)
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 2, 30, 8)
    mask = (torch.arange(30) >= 2) & (torch.arange(30) < 26)
    for b in range(3):
        rows = [torch.softmax(keys[b, h // 2] @ query[b, h] / 8**0.5, 0) for h in range(4)]
        expected = torch.stack(rows).mean(0)[2:26].topk(7).indices.sort().values
        assert torch.equal(fastv(query, keys, mask.expand(3, -1), 7)[b], expected)


@pytest.mark.parametrize("rule", RULES)
def test_batches_and_counts(rule):
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 9, 16)
    for count in (0, 1, 5, 35, 36):
        kept = rule(features, count)
        assert kept.shape == (2, 3, count)
        assert kept.dtype == torch.int64
        assert torch.equal(kept[1, 2], rule(features[1, 2], count))
        assert all(len(set(row.tolist())) == count for row in kept.flatten(0, 1))
        assert torch.equal(kept, kept.sort(-1).values)


@pytest.mark.parametrize("rule", RULES)
def test_errors(rule):
    with pytest.raises(ValueError, match=r"num_tokens=37 must be in \[0, N=36\]"):
        rule(torch.randn(4, 9, 16), 37)
    with pytest.raises(ValueError, match="features must be real"):
        rule(torch.randn(9, 16), 3)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [divprune, evs, vidcom2])
def test_a_token_that_is_no_number_comes_last(rule, odd):
    torch.manual_seed(0)
    features = torch.randn(2, 4, 6, 8)
    features[0, 1, 2, 3] = odd
    bad = 1 * 6 + 2
    kept = rule(features, 23)
    assert kept[0].tolist() == [i for i in range(24) if i != bad]
    assert torch.equal(rule(features, 24)[0], torch.arange(24))
    assert torch.equal(kept[1], rule(features[1], 23))
    assert bad not in rule(features, 12)[0]


def test_fastv_counts_video_tokens_alone():
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 0]).bool()
    query, keys = torch.randn(4, 8), torch.randn(2, 9, 8)
    assert fastv(query, keys, mask, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"num_tokens=5 must be in \[0, N=4\]. Ask for at most 4"):
        fastv(query, keys, mask, 5)
    keys[0, 4] = math.nan
    assert len(set(fastv(query, keys, mask, 3).tolist())) == 3


def test_fastv_compiles_and_maps():
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 0]).bool()
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 2, 7, 8)
    wanted = torch.stack([fastv(q, k, mask, 2) for q, k in zip(query, keys, strict=True)])
    compiled = torch.compile(fastv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query[0], keys[0], mask, 2), wanted[0])
    assert torch.equal(torch.vmap(lambda q, k: fastv(q, k, mask, 2))(query, keys), wanted)
