"""sample_combinations: the published probabilities, the op contract, odd values, backends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import check_every_instruction_set, golden
from hypothesis import given, settings
from hypothesis import strategies as st

import cacovid_kernels as ck
from cacovid_kernels.ops import combinations as ops
from cacovid_kernels.reference import combinations as reference
from cacovid_kernels.reference.random import gumbel_noise, ln_float, random_bits

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("indices", "groups", "frame_indices", "frame_status", "frame_draw_status", "status")
FLOAT_FIELDS = ("log_prob", "frame_log_prob")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: ck.Combinations, b: ck.Combinations, exactly: bool = False) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in FLOAT_FIELDS:
        tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 3e-6}
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)
    assert (a.lengths, a.frame_lengths, a.grid_thw) == (b.lengths, b.frame_lengths, b.grid_thw)


def both(call):
    results = []
    for name in ("reference", "cpu"):
        with ck.use_backend(name):
            results.append(call())
    return results


def sample(scores, frames=None, grid=None, **options) -> ck.Combinations:
    defaults = {"num_samples": 6, "keep_ratio": 0.05, "seed": 3}
    if frames is not None:
        defaults["num_frame_samples"] = 5
    return ck.sample_combinations(scores, frames, grid, **{**defaults, **options})


# ---- the published code -------------------------------------------------------------------------


@pytest.mark.parametrize("vector", golden("combination_space"))
def test_probabilities_are_the_published_ones(vector):
    logits = torch.from_numpy(vector["logits"])[None]
    groups, cap = int(vector["num_groups"]), float(vector["max_group_prob"])
    group, probability, weight = reference.combination_space(logits, 1, groups, cap)
    assert np.abs(probability[0].numpy() - vector["group_prob"]).max() < 1e-6
    within = torch.zeros(groups, logits.shape[1], dtype=torch.float64)
    within[group[0], torch.arange(logits.shape[1])] = weight[0].double()
    within = within / (within.sum(1, keepdim=True) + 1e-8)
    assert np.abs(within.numpy() - vector["within_group_prob"]).max() < 1e-6


def published_caps(share: list[float], cap: float) -> list[float]:
    """The recursion of the published code, one share at a time."""
    n, out = len(share), [True] * len(share)

    def clip(p: list[float], cap: float) -> list[float]:
        p = [max(x, 1 / n**2) for x in p]
        total = sum(x for x, inside in zip(p, out, strict=True) if inside)
        p = [x / total if inside else 0.0 for x, inside in zip(p, out, strict=True)]
        if sum(out) == 1:
            return p
        cap = min(cap, 0.999)
        largest = p.index(max(p))
        if p[largest] <= cap:
            return p
        out[largest] = False
        p = [x * (1 - cap) for x in clip(p, cap / (1 - cap))]
        p[largest] = cap
        return p

    return clip(share, cap)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 40), spread=st.floats(0, 12), room=st.floats(1.01, 4), seed=st.integers(0, 999))
def test_caps_are_the_published_recursion(n, spread, room, seed):
    share = (randn(n, seed=seed).double() * spread).softmax(0).sort(descending=True).values
    cap = min(room / n, 1.0)
    found = reference.cap_shares(share[None], torch.tensor([n]), cap)[0]
    assert np.allclose(found.numpy(), published_caps(share.tolist(), cap), rtol=1e-6, atol=1e-9)
    assert abs(found.sum().item() - 1) < 1e-9
    assert found.max().item() <= cap + 1e-9


def test_a_sample_follows_from_the_space_and_the_noise(backend):
    scores, k, groups, cap = randn(3, 60) * 2, 4, 5, 0.4
    args = scores, None, [3, 6, 10], 4, [k], [groups], cap * groups, 0, [1], True, 17, 8, None
    found = ops._sample_combinations(*args)
    indices, drawn, log_prob = found[0].reshape(4, 3, k), found[1], found[2]
    group, probability, weight = reference.combination_space(scores, k, groups, cap)
    assert torch.equal(indices[0] - torch.arange(3)[:, None] * 60, scores.topk(k).indices.sort(1).values)
    assert (drawn[0] == -1).all()
    assert (log_prob[0] == 0).all()
    zero = torch.zeros((), dtype=torch.int64)
    for s in range(1, 4):
        for f in range(3):
            column, name = torch.arange(60) + 60 * f, torch.tensor(s)
            shares = (probability[f] * 2**30).round().cumsum(0)
            bits = random_bits(torch.tensor(f), zero, name, 17, 8, 254)
            assert drawn[s, f] == int((shares <= (bits * int(shares[-1])) >> 32).sum())
            member = group[f] == drawn[s, f]
            noise = gumbel_noise(random_bits(column, zero, name, 17, 8, 255))
            key = torch.where(member, ln_float(weight[f]) + noise, -INF)
            order = key.topk(k).indices
            assert torch.equal(indices[s, f] - 60 * f, order.sort().values)
            inside = ck.pl_log_prob(torch.where(member, weight[f], 0).double().log(), order)
            wanted = probability[f, drawn[s, f]].log() + inside
            assert log_prob[s, f].item() == pytest.approx(wanted.item(), abs=3e-6)


def test_official_plan():
    """25 groups, 4 tokens of a frame, cap 0.1: the published configuration."""
    for mode in ("official", "strict"):
        found = sample(randn(32, 196), keep_ratio=0.02, mode=mode)
        assert found.lengths == (128,)
        assert found.groups[1:].max() <= 24
        space = ops._parse_space(((32, 14, 14),), 0.02, 2.0, 2.0, 0.125, mode == "strict")
        assert (space.num_draw, space.num_groups, space.num_frames) == ([4], [25], [4])
    assert ops.group_cap(25, 2.0) == 0.1


def test_strict_frames_are_capped(backend):
    scores = torch.zeros(32)
    scores[3] = 9.0
    weights = reference.frame_weights(scores, 8, True)
    assert weights.max().item() == pytest.approx(3 / 32, rel=1e-6)
    assert weights.sum().item() == pytest.approx(1, rel=1e-6)
    official = reference.frame_weights(scores, 8, False)
    assert official.max() > 0.99
    assert official.min().item() == pytest.approx(1 / 64)


def test_strict_makes_fewer_groups_and_draws_at_least_one(backend):
    found = sample(randn(4, 10), keep_ratio=0.3, group_size=0.5, mode="strict")
    assert found.lengths == (12,)
    assert found.groups.max() <= 2  # three groups of 3 or 4, not six
    assert (found.mask().reshape(6, 4, 10).sum(2) == 3).all()
    assert sample(randn(2, 4), keep_ratio=0.01, mode="strict").lengths == (2,)


# ---- contract -----------------------------------------------------------------------------------


def test_a_combination_takes_the_same_number_from_every_frame(backend):
    found = sample(randn(5, 49), randn(5), keep_ratio=0.1, num_samples=9)
    assert found.indices.shape == (9, 25)
    assert found.groups.shape == found.log_prob.shape == (9, 5)
    assert found.frame_indices.shape == (5, 1)
    assert found.frame_log_prob.shape == (5, 1)
    assert (found.indices.diff(dim=1) > 0).all()
    assert (found.mask().reshape(9, 5, 49).sum(2) == 5).all()
    assert (found.frame_mask().sum(1) == 1).all()
    assert (found.log_prob[1:] < 0).all()
    assert (found.groups[1:] >= 0).all()


def test_the_first_row_is_the_top(backend):
    scores, frames = randn(6, 30), randn(6)
    found = sample(scores, frames, keep_ratio=0.2, frame_ratio=0.5)
    top = scores.topk(6).indices.sort(1).values + torch.arange(6)[:, None] * 30
    assert torch.equal(found.indices[0], top.reshape(-1))
    assert torch.equal(found.frame_indices[0], frames.topk(3).indices.sort().values)
    assert (found.frame_log_prob[0] == 0).all()


def test_ties_of_the_top_go_to_the_lower_index(backend):
    found = sample(torch.zeros(2, 20), torch.zeros(2), keep_ratio=0.2, frame_ratio=0.5)
    assert found.indices[0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert found.frame_indices[0].tolist() == [0]


def test_selection_of_a_row(backend):
    found = sample(randn(5, 6, 7), grid=[(5, 6, 7)])
    chosen = found.selection(2)
    assert torch.equal(chosen.mask(), found.mask()[2])
    assert torch.equal(chosen.frame_counts, torch.full((5,), 2))
    assert chosen.lengths == (10,)
    assert ck.gather_tokens(torch.arange(210.0), chosen).tolist() == found.indices[2].tolist()


def test_videos_of_any_shape(backend):
    grid = [(3, 4, 4), (2, 5, 5), (1, 10, 10)]
    tokens, frames = randn(48 + 50 + 100), randn(6)
    found = sample(tokens, frames, grid, keep_ratio=0.1)
    assert found.lengths == (6, 4, 10)
    assert found.frame_lengths == (1, 1, 1)
    assert found.frame_status.shape == (6,)
    assert found.status.shape == found.frame_draw_status.shape == (3,)
    mask = found.mask()
    assert (mask[:, :48].sum(1) == 6).all()
    assert (mask[:, 48:98].sum(1) == 4).all()
    # A video's noise is named by its number and the place in it, not by its batch-mates.
    others = sample(torch.cat([randn(36, seed=1), tokens[48:98]]), randn(6), [(4, 3, 3), (2, 5, 5)], keep_ratio=0.1)
    assert torch.equal(others.indices[:, -4:] - 36, found.indices[:, 6:10] - 48)
    assert torch.equal(others.log_prob[:, -2:], found.log_prob[:, 3:5])


def test_no_videos(backend):
    for scores, grid in ((torch.zeros(0), []), (torch.zeros(0, 3, 4), None)):
        for frames in (None, torch.zeros(0)):
            found = sample(scores, frames, grid, num_samples=3)
            assert found.indices.shape == found.groups.shape == found.log_prob.shape == (3, 0)
            assert found.frame_indices.shape == found.frame_log_prob.shape == (0 if frames is None else 5, 0)
            assert found.status.shape == found.frame_status.shape == found.frame_draw_status.shape == (0,)


def test_more_samples_begin_with_the_same(backend):
    scores, frames = randn(4, 50), randn(4)
    few = sample(scores, frames, num_samples=3, num_frame_samples=2, mode="strict")
    many = sample(scores, frames, num_samples=40, num_frame_samples=9, mode="strict")
    assert torch.equal(many.indices[:3], few.indices)
    assert torch.equal(many.frame_indices[:2], few.frame_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_packed_and_strided_mean_the_same(dtype, backend):
    tokens, frames = randn(2, 3, 40).to(dtype), randn(2, 3).to(dtype)
    grid = [(3, 5, 8)] * 2
    wanted = sample(tokens.reshape(-1), frames.reshape(-1), grid)
    for shape in ((2, 3, 40), (6, 40), (240,), (3, 80), (24, 10)):
        assert_same(sample(tokens.reshape(shape), frames, grid), wanted, exactly=True)
    wide = torch.zeros(2, 6, 120, dtype=dtype)[:, ::2, ::3].copy_(tokens)
    tall = torch.zeros(5, 2, 7, dtype=dtype).permute(1, 2, 0)[:, ::3, 1].copy_(frames)
    assert_same(sample(wide, tall, grid), wanted, exactly=True)
    assert_same(sample(tokens.float(), frames.float(), grid), wanted, exactly=True)


SHAPES = [
    ((3, 14, 14), 0.02, 2.0), ((2, 4, 5), 0.1, 2.0), ((2, 27, 27), 0.02, 2.0), ((1, 40, 40), 0.04, 2.0),
    ((4, 8, 8), 0.25, 1.0), ((2, 7, 7), 1.0, 2.0), ((1, 1, 1), 1.0, 2.0), ((5, 3, 3), 0.3, 1.5),
    ((2, 13, 20), 0.015, 5.0), ((1, 1, 600), 0.3, 1.6), ((9, 16, 17), 0.03, 3.9), ((2, 16, 16), 0.5, 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "keep_ratio", "group_size"), SHAPES)
@pytest.mark.parametrize("mode", ["official", "strict"])
def test_engine_equals_reference(grid, keep_ratio, group_size, mode):
    t, h, w = grid
    for i, dtype in enumerate(DTYPES):
        tokens, frames = (randn(t * h * w, seed=i) * 3).to(dtype), randn(t, seed=i)
        options = {"keep_ratio": keep_ratio, "group_size": group_size, "mode": mode, "frame_ratio": 0.4, "step": i}
        assert_same(*both(lambda a=tokens, b=frames, o=options: sample(a, b, [grid], **o)))


@settings(max_examples=120, deadline=None)
@given(
    t=st.integers(1, 4), p=st.integers(1, 300), keep=st.floats(0.01, 1), size=st.floats(0.3, 6),
    seed=st.integers(-(2**63), 2**64 - 1), scale=st.sampled_from([0.0, 1e-7, 1.0, 40.0, 1e30]),
    holes=st.floats(0, 1), samples=st.integers(1, 5), mode=st.sampled_from(["official", "strict"]),
)  # fmt: skip
def test_engine_equals_reference_on_anything(t, p, keep, size, seed, scale, holes, samples, mode):
    generator = torch.Generator().manual_seed(seed & 0xFFFF)

    def scores(*shape):
        x = torch.randn(*shape, generator=generator) * scale + 1
        odd = torch.tensor([-INF, -INF, NAN, INF])[torch.randint(0, 4, shape, generator=generator)]
        return torch.where(torch.rand(*shape, generator=generator) < holes - 0.3, odd, x)

    tokens, frames = scores(t, p), scores(t)
    options = {"keep_ratio": keep, "group_size": size, "seed": seed, "num_samples": samples, "mode": mode}
    groups = max(int(1 / keep / size), 1)
    if mode == "official" and (groups > p or not 1 <= round(keep * p) <= p // groups):
        with pytest.raises(ValueError, match=r"keep_ratio|group_size"):
            sample(tokens, frames, **options)
        return
    results = both(lambda: sample(tokens, frames, frame_ratio=0.6, **options))
    assert_same(*results)
    held = results[0].indices[results[0].indices >= 0]
    assert (tokens.reshape(-1)[held] > -INF).all()


def test_nearly_equal_scores_are_ranked_exactly():
    """The engine's ranking looks at the leading bits first: these differ in the last ones only."""
    base = torch.full((64, 200), 1.0)
    steps = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i)) for i in range(64)])
    bits = base.view(torch.int32) + (steps % torch.arange(1, 65)[:, None]).int()
    tokens = bits.view(torch.float32)
    tokens[:, 17] = -1000.0
    tokens[1::2, 18] = 1000.0
    assert_same(*both(lambda: sample(tokens, keep_ratio=0.05)))


# ---- odd scores ---------------------------------------------------------------------------------


def test_tokens_without_a_chance_are_never_drawn(backend):
    scores = randn(3, 40)
    scores[0, 5:] = -INF  # five left, to draw 4 from: only the first of five groups of 8 holds enough
    scores[1, ::2] = NAN  # 20 left: the third group holds just enough
    scores[2, 2:] = NAN  # two left, which are all taken
    found = sample(scores, keep_ratio=0.1, num_samples=200)
    mask = found.mask().reshape(200, 3, 40)
    assert not mask[:, 0, 5:].any()
    assert (mask[:, 0].sum(1) == 4).all()
    assert not mask[:, 1, ::2].any()
    assert (mask[:, 1].sum(1) == 4).all()
    assert (mask[:, 2, :2]).all()
    assert (mask[:, 2].sum(1) == 2).all()
    assert found.indices[:, 8:].tolist() == [[80, 81, -1, -1]] * 200
    assert (found.groups[1:, [0, 2]] == 0).all()
    assert found.groups[1:, 1].max() == 2
    assert found.frame_status.tolist() == [0, ck.Status.NAN, ck.Status.NAN | ck.Status.SHORT]
    assert found.status.tolist() == [ck.Status.NAN | ck.Status.SHORT]
    assert torch.allclose(found.log_prob[1:, 2].exp(), torch.tensor(0.5))  # two orders of two clamped weights


def test_infinite_scores_take_all_the_probability(backend):
    scores = torch.zeros(1, 40)
    scores[0, 7] = INF
    found = sample(scores, keep_ratio=0.1, num_samples=800, group_size=2.5)
    assert found.status.tolist() == [ck.Status.POSINF]
    share = (found.groups[1:] == 0).float().mean()
    assert share == pytest.approx(0.5, abs=0.05)  # four groups, cap 2 / 4
    assert found.mask()[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 7]


def test_frames_without_a_chance_are_never_drawn(backend):
    frames = torch.tensor([0.0, -INF, 1.0, NAN, 2.0, -INF])
    for mode in ("official", "strict"):
        found = sample(torch.zeros(6, 20), frames, frame_ratio=0.3, num_frame_samples=50, mode=mode)
        assert (found.frame_mask().sum(1) == 2).all()
        assert not found.frame_mask()[:, [1, 3, 5]].any()
        assert found.frame_draw_status.tolist() == found.status.tolist() == [ck.Status.NAN]
        assert found.frame_status.tolist() == [0] * 6
        short = sample(torch.zeros(6, 20), frames, frame_ratio=0.8, mode=mode)
        assert short.frame_indices.tolist() == [[0, 2, 4, -1, -1]] * 5
        assert short.status.tolist() == [ck.Status.NAN | ck.Status.SHORT]
        assert torch.isfinite(short.frame_log_prob).all()


def test_check_raises(backend):
    scores = torch.zeros(2, 3, 20)
    scores[1, 2, 4] = NAN
    with pytest.raises(ValueError, match="sample_combinations: video 1 has NAN values"):
        sample(scores, check="raise")


# ---- errors -------------------------------------------------------------------------------------

GOOD = (torch.zeros(4, 50), torch.zeros(4))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (GOOD, {"keep_ratio": 0.0}, ValueError, r"keep_ratio=0.0 must be in \(0, 1\]"),
        (GOOD, {"keep_ratio": 1.1}, ValueError, r"keep_ratio=1.1 must be in \(0, 1\]"),
        (GOOD, {"keep_ratio": NAN}, ValueError, r"keep_ratio=nan must be in \(0, 1\]"),
        (GOOD, {"frame_ratio": 0.0}, ValueError, r"frame_ratio=0.0 must be in \(0, 1\]"),
        (GOOD, {"group_size": 0.0}, ValueError, r"group_size=0.0 must be positive"),
        (GOOD, {"group_size": -INF}, ValueError, r"group_size=-inf must be positive"),
        (GOOD, {"max_group_prob": NAN}, ValueError, r"max_group_prob=nan must be positive"),
        (GOOD, {"max_group_prob": 0.9}, ValueError, r"max_group_prob=0.9 caps 10 groups at 0.1 each.*above 1"),
        (GOOD, {"keep_ratio": 0.01, "mode": "official"}, ValueError, r"keep_ratio=0.01 draws no token .*strict"),
        (GOOD, {"keep_ratio": 0.1, "group_size": 0.5, "mode": "official"}, ValueError,
         r"group_size=0.5 leaves groups of 2 tokens \(frames of 1 x 50\), fewer than the 5 to draw.*strict"),
        (GOOD, {"num_samples": 0}, ValueError, r"num_samples=0 must be in \[1, 2\^24\]"),
        (GOOD, {"num_samples": 2.5}, TypeError, r"num_samples=2.5 must be an integer"),
        (GOOD, {"num_frame_samples": -1}, ValueError, r"num_frame_samples=-1 must be in \[0, 2\^24\]"),
        (GOOD, {"seed": 2**64}, ValueError, r"seed=18446744073709551616 must be in"),
        (GOOD, {"step": -1}, ValueError, r"step=-1 must be in"),
        (GOOD, {"mode": "other"}, ValueError, r"mode='other' must be one of"),
        (GOOD, {"check": "other"}, ValueError, r"check='other' must be one of"),
        ((GOOD[0], None), {"num_frame_samples": 2}, ValueError, r"num_frame_samples=2 needs frame_scores"),
        ((GOOD[0], torch.zeros(5)), {}, ValueError, r"frame_scores must hold one score for each of the 4 frames"),
        ((GOOD[0], GOOD[1].long()), {}, TypeError, r"frame_scores must be float32"),
        ((GOOD[0], GOOD[1].to("meta")), {}, ValueError, r"frame_scores is on meta but token_scores on cpu"),
        ((GOOD[0].long(),), {}, TypeError, r"token_scores must be float32"),
        ((torch.zeros(200),), {}, ValueError, r"grid_thw is needed for packed scores"),
        ((torch.zeros(200), None, [(2, 3, 4)]), {}, ValueError, r"token_scores must hold one score for each of the 24"),
    ],
)  # fmt: skip
def test_errors(args, options, error, message):
    with pytest.raises(error, match=f"^sample_combinations: {message}"):
        sample(*args, **options)


def test_engine_refuses_what_would_write_out_of_bounds():
    x, i64 = torch.zeros(40), torch.int64
    sizes = {
        "grid": [2, 4, 5], "draw": [3], "groups": [4], "cap": [0.5], "frames": [1],
        "indices": torch.empty(2, 6, dtype=i64), "drawn": torch.empty(2, 2, dtype=i64), "log_prob": torch.empty(2, 2),
        "frame_indices": torch.empty(0, 1, dtype=i64), "frame_log_prob": torch.empty(0, 1),
        "frame_status": torch.empty(2, dtype=torch.int32), "frame_draw_status": torch.empty(0, dtype=torch.int32),
    }  # fmt: skip

    def call(samples=2, frame_samples=0, step=0, **changed):
        a = {**sizes, **changed}
        ck._C.sample_combinations(
            a.get("x", x), None, a["grid"], samples, a["draw"], a["groups"], a["cap"], frame_samples, a["frames"],
            True, 0, step, 1, a["indices"], a["drawn"], a["log_prob"], a["frame_indices"], a["frame_log_prob"],
            a["frame_status"], a["frame_draw_status"],
        )  # fmt: skip

    call()
    for changed in (
        {"draw": [6]}, {"draw": [-1]}, {"groups": [0]}, {"groups": [21]}, {"groups": [7]}, {"cap": [0.0]},
        {"cap": [NAN]}, {"frames": [3]}, {"grid": [2, 4, 6]}, {"grid": [2, 4]}, {"samples": 3}, {"samples": 0},
        {"frame_samples": 1},
        {"step": 2**32}, {"x": x.long()}, {"x": x.reshape(4, 10)}, {"frame_status": torch.empty(1, dtype=torch.int32)},
        {"frame_draw_status": torch.empty(1, dtype=torch.int32)},
        {"log_prob": torch.empty(4, 2).t()}, {"indices": torch.empty(2, 6)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|need"):
            call(**changed)


# ---- threads, instruction sets, devices, compilation --------------------------------------------


def test_result_does_not_depend_on_threads(threads):
    scores, frames = randn(300, 60), randn(300)
    found = sample(scores, frames, num_samples=40)
    torch.set_num_threads(1)
    assert_same(found, sample(scores, frames, num_samples=40), exactly=True)
    many = sample(scores[:2], frames[:2], num_samples=3000)
    torch.set_num_threads(threads)
    assert_same(many, sample(scores[:2], frames[:2], num_samples=3000), exactly=True)


ISA_SCRIPT = """
import hashlib, torch, cacovid_kernels as ck
generator = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for t, p, keep in ((3, 196, 0.02), (2, 100, 0.1), (2, 300, 0.02), (1, 900, 0.06), (4, 256, 0.03), (2, 64, 0.5)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, f = (torch.randn(t, p, generator=generator) * 2).to(dtype), torch.randn(t, generator=generator)
        c = ck.sample_combinations(x, f, num_samples=30, keep_ratio=keep, num_frame_samples=5, frame_ratio=0.5, seed=p)
        for field in (c.indices, c.groups, c.log_prob, c.frame_indices, c.frame_log_prob):
            digest.update(field.numpy().tobytes())
print(ck._C.cpu_isa, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


def test_views_gradients_and_default_devices(backend):
    tokens, frames = randn(4, 50), randn(4)
    wanted = sample(tokens, frames)
    lazy = torch.complex(tokens, -tokens).conj().imag
    assert lazy.is_neg()
    assert_same(sample(lazy, frames), wanted, exactly=True)
    leaf = sample(tokens.clone().requires_grad_(), frames.clone().requires_grad_())
    assert_same(leaf, wanted, exactly=True)
    assert not leaf.log_prob.requires_grad
    with torch.device("meta"):
        found = sample(tokens, frames)
    assert_same(found, wanted, exactly=True)
    numbers = {"num_samples": np.int64(6), "seed": np.int8(3), "keep_ratio": np.float64(0.05)}
    assert_same(sample(tokens, frames, torch.tensor([[4, 1, 50]]), **numbers), wanted, exactly=True)


@pytest.mark.parametrize("mode", ["official", "strict"])
def test_nothing_is_read_on_the_host(mode):
    """On meta tensors every host read is an error, inside an op too, where no dispatch mode looks."""
    tokens, frames = torch.zeros(4, 50, device="meta"), torch.zeros(4, device="meta")
    with ck.use_backend("reference"):
        found = sample(tokens, frames, mode=mode)
    assert found.indices.shape == (6, 8)
    assert found.mask().shape == (6, 200)
    assert found.frame_mask().shape == (5, 4)
    assert found.selection(1).indices.shape == (8,)


def test_opcheck():
    args = ([4, 5, 10], 3, [2], [10], 2.0, 2, [1], True, -7, 1, None)
    torch.library.opcheck(ops._sample_combinations.dispatch, (randn(4, 50), randn(4), *args))
    none = (*args[:5], 0, *args[6:])
    torch.library.opcheck(ops._sample_combinations.dispatch, (randn(200), None, *none))


def test_compiles_whole_without_recompiling():
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def draws(tokens, frames, step):
        found = sample(tokens * 2, frames, step=step)
        return found.indices + 0, found.groups, found.log_prob, found.mask(), found.frame_indices

    for frames, step in ((4, 2), (5, 3), (7, 4), (9, 2**31)):
        tokens, per_frame = randn(frames, 50), randn(frames)
        indices, groups, _, mask, frame_indices = draws(tokens, per_frame, step)
        wanted = sample(tokens * 2, per_frame, step=step)
        assert torch.equal(indices, wanted.indices)
        assert torch.equal(groups, wanted.groups)
        assert torch.equal(mask, wanted.mask())
        assert torch.equal(frame_indices, wanted.frame_indices)
    assert compilations <= 4
