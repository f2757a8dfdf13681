"""Budget, selection and segmented top-k: published vectors, the op contract, properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from common import check_every_instruction_set, check_fork, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cacovid_kernels as ck
from cacovid_kernels.ops import select as ops
from cacovid_kernels.reference.exact import order_key

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a: ck.Selection, b: ck.Selection) -> bool:
    fields = ("indices", "frame_counts", "frame_status")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) and a.lengths == b.lengths


def both(*args, **kwargs) -> tuple[ck.Selection, ck.Selection]:
    results = []
    for name in ("reference", "cpu"):
        with ck.use_backend(name):
            results.append(ck.select_tokens(*args, **kwargs))
    return results[0], results[1]


# ---- the published code -------------------------------------------------------------------------


@pytest.mark.parametrize("vector", golden("selection"))
def test_official_mode_reproduces_the_published_selection(vector, backend):
    t, h, w = (int(n) for n in vector["grid_thw"])
    token = torch.from_numpy(vector["token_logits"]).diff(dim=-1).squeeze(-1)
    frame = torch.from_numpy(vector["frame_logits"]).diff(dim=-1).squeeze(-1)
    ratios = {key: float(vector[key]) for key in ("keep_ratio", "importance_ratio", "max_frame_ratio")}
    kept = ck.select_tokens(token, frame, [(t, h, w)], **ratios)
    expected = torch.from_numpy(vector["mask"]).nonzero().squeeze(1)
    assert torch.equal(kept.indices, expected)
    assert torch.equal(kept.frame_counts, torch.bincount(expected // (h * w), minlength=t))


def loop_budget(scores, t, p, keep, importance, cap_ratio):
    """The published arithmetic as a loop of single steps, float64; no frame gets more than its p tokens."""
    x = scores.double() / scores.double().abs().max() * 3
    weight = x.softmax(0).clip(1 / (2 * t), 1 / (t * keep) * cap_ratio)
    weight = weight / weight.sum()
    cap = min(int(importance * p * cap_ratio), p)
    counts = (weight * round(importance * keep * p * t)).round().clip(min=1).clip(max=cap)
    counts = counts.long().tolist()
    missing = math.floor(importance * keep * p * t) - sum(counts)
    while missing:
        if missing > 0:
            counts[counts.index(min(counts))] += 1
        else:
            counts[counts.index(max(counts))] -= 1
        missing += -1 if missing > 0 else 1
    return counts


@pytest.mark.parametrize("frames", [1, 2, 7, 32, 97])
@pytest.mark.parametrize("keep", [0.03, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("importance", [0.3, 1.0])
def test_budget_levels_like_the_published_loop(frames, keep, importance, backend):
    generator = torch.Generator().manual_seed(frames)
    for _ in range(10):
        scores = torch.randn(frames, generator=generator) * 3
        counts = ck.allocate_budget(
            scores, [(frames, 7, 7)], keep_ratio=keep, importance_ratio=importance, max_frame_ratio=1.5 * keep
        )
        if importance == 1.0:
            assert abs(int(counts.sum()) - keep * frames * 49) < 1
        assert counts.tolist() == loop_budget(scores, frames, 49, keep, importance, 1.5 * keep)


# ---- values, ties, order ------------------------------------------------------------------------


def test_ties_go_to_the_lower_index(backend):
    kept = ck.select_tokens(torch.zeros(3, 10), keep_ratio=0.4, importance_ratio=1.0)
    assert kept.indices.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


def test_order_of_odd_scores(backend):
    scores = torch.tensor([NAN, -INF, 1.0, -0.0, 0.0, INF, NAN, -INF, -2.0])
    ranked = [5, 2, 3, 4, 8, 1, 7, 0, 6]
    for k in range(len(ranked) + 1):
        assert ck.segmented_topk(scores, k, order="score").tolist() == ranked[:k]
        assert ck.segmented_topk(scores, k).tolist() == sorted(ranked[:k])


def test_order_keys_follow_the_order_of_floats():
    scores = torch.tensor([NAN, -INF, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, INF])
    keys = order_key(scores)
    assert keys[5] == keys[6]
    assert (keys.unique_consecutive().diff() > 0).all()


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-42), (torch.bfloat16, 1e-40), (torch.float16, 6e-8)])
def test_subnormal_scores_keep_their_order_where_they_are_flushed(dtype, step, backend):
    scores = (torch.arange(1, 33).double() * step).to(dtype)
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this CPU cannot flush subnormal numbers")
        found = ck.segmented_topk(scores, 3)
        torch.set_flush_denormal(False)
        assert found.tolist() == [29, 30, 31]


def test_status_and_check(backend):
    frames = torch.tensor([0.0, 1.0, 2.0, 3.0])
    tokens = torch.randn(4, 6)
    tokens[1, 2] = NAN
    kept = ck.select_tokens(tokens, frames, keep_ratio=0.5)
    assert kept.status.tolist() == [ck.Status.NAN]
    assert kept.indices.numel() == 12
    assert kept.frame_status.tolist() == [0, ck.Status.NAN, 0, 0]
    frames[2] = INF
    both_flags = ck.select_tokens(tokens, frames, keep_ratio=0.5).status
    assert both_flags.tolist() == [ck.Status.NAN | ck.Status.POSINF]
    with pytest.raises(ValueError, match=r"select_tokens: video 0 has NAN \| POSINF values"):
        ck.select_tokens(tokens, frames, keep_ratio=0.5, check="raise")
    with pytest.raises(ValueError, match="allocate_budget: video 1 has POSINF values"):
        ck.allocate_budget(frames, [(2, 2, 3)] * 2, keep_ratio=0.5, check="raise")
    with pytest.raises(ValueError, match="segment 1 has NAN"):
        ck.segmented_topk(tokens, 2, check="raise")


def test_status_of_frames_and_videos(backend):
    tokens = torch.zeros(36)
    tokens[0], tokens[20], tokens[35] = NAN, INF, NAN
    for grid, videos in (([(2, 1, 6), (4, 1, 6)], [1, 3]), ([(2, 1, 6)] * 3, [1, 2, 1])):
        kept = ck.select_tokens(tokens, None, grid, keep_ratio=0.5)
        assert kept.frame_status.tolist() == [1, 0, 0, 2, 0, 1]
        assert kept.status.tolist() == videos
        assert kept.status.dtype == torch.int32


@pytest.mark.parametrize("frames", [[NAN] * 4, [-INF] * 4, [0.0] * 4, [5.0] * 4])
def test_frames_without_a_difference_share_equally(frames, backend):
    kept = ck.select_tokens(torch.randn(4, 10), torch.tensor(frames), keep_ratio=0.5, importance_ratio=1.0)
    assert kept.frame_counts.tolist() == [5, 5, 5, 5]


def test_score_order_is_a_permutation_of_index_order(backend):
    scores = torch.randn(2, 5, 12)
    by_index = ck.select_tokens(scores, keep_ratio=0.4)
    by_score = ck.select_tokens(scores, keep_ratio=0.4, order="score")
    flat = scores.reshape(-1)
    for a, b in zip(by_index.indices.split(by_index.lengths), by_score.indices.split(by_score.lengths), strict=True):
        assert torch.equal(b.sort().values, a)
        assert (flat[b].diff() <= 0).all()


def test_fill_none_keeps_the_ranked_part_only(backend):
    scores, frames = torch.randn(8, 20), torch.randn(8)
    options = {"keep_ratio": 0.5, "importance_ratio": 0.5}
    ranked = ck.select_tokens(scores, frames, fill="none", **options)
    assert ranked.lengths == (40,)
    assert set(ranked.indices.tolist()) <= set(ck.select_tokens(scores, frames, **options).indices.tolist())
    counts = ck.allocate_budget(frames, [(8, 4, 5)], **options)
    assert torch.equal(ranked.frame_counts, counts)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this torch does not fuse")
@pytest.mark.parametrize("tokens", [200 * 196, 400 * 196, 768 * 196, 1000 * 196])
def test_long_fills_follow_linspace(tokens, backend):
    """From 400 frames on, whether `end - step * k` is rounded once or twice moves picks."""
    for count in (tokens // 10, tokens // 10 + 1, 1001):
        kept = ck.select_tokens(torch.zeros(1, tokens), num_tokens=count, importance_ratio=0.0)
        assert torch.equal(kept.indices, torch.linspace(0, tokens - 1, count).round().long())


def test_fill_none_chooses_a_number_of_tokens_by_score_alone(backend):
    scores, frames = torch.randn(8, 20), torch.tensor([0.0] * 7 + [5.0])
    kept = ck.select_tokens(scores, frames, num_tokens=80, fill="none")
    ranked = ck.select_tokens(scores, frames, num_tokens=80, importance_ratio=1.0)
    assert torch.equal(kept.indices, ranked.indices)
    assert kept.frame_counts[-1] > 10


def test_importance_zero_is_a_uniform_grid(backend):
    kept = ck.select_tokens(torch.randn(1, 101), keep_ratio=0.11, importance_ratio=0.0)
    assert kept.indices.tolist() == list(range(0, 101, 10))


# ---- shapes, layouts, strides -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_and_packed_mean_the_same(dtype, backend):
    tokens, frames = torch.randn(3, 5, 14).to(dtype), torch.randn(3, 5).to(dtype)
    dense = ck.select_tokens(tokens, frames, keep_ratio=0.3)
    packed = ck.select_tokens(tokens.reshape(-1), frames.reshape(-1), [(5, 2, 7)] * 3, keep_ratio=0.3)
    assert torch.equal(dense.indices, packed.indices)
    assert torch.equal(dense.frame_counts, packed.frame_counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_stride_gives_the_same_bits(dtype, backend):
    tokens, frames = torch.randn(6, 31).to(dtype), torch.randn(6).to(dtype)
    expected = ck.select_tokens(tokens, frames, keep_ratio=0.4)
    wide = torch.full((13, 70), NAN, dtype=dtype)
    wide[1::2, 3:65:2] = tokens
    spread = torch.full((19,), NAN, dtype=dtype)
    spread[1::3] = frames
    for view in (wide[1::2, 3:65:2], tokens.t().contiguous().t(), tokens[None].expand(1, 6, 31)):
        assert torch.equal(ck.select_tokens(view, spread[1::3], keep_ratio=0.4).indices, expected.indices)
    constant = torch.ones(1, dtype=dtype).expand(6, 31)
    assert same(*both(constant, keep_ratio=0.4))


def test_videos_of_a_batch_do_not_see_each_other(backend):
    grids = [(3, 2, 5), (1, 7, 7), (9, 1, 4)]
    sizes = [t * h * w for t, h, w in grids]
    tokens = [torch.randn(n) for n in sizes]
    frames = [torch.randn(t) for t, _, _ in grids]
    together = ck.select_tokens(torch.cat(tokens), torch.cat(frames), grids, keep_ratio=0.35)
    start = 0
    for i, kept in enumerate(together.indices.split(together.lengths)):
        alone = ck.select_tokens(tokens[i], frames[i], [grids[i]], keep_ratio=0.35)
        assert torch.equal(kept - start, alone.indices)
        start += sizes[i]


def test_num_tokens_is_exact_per_video(backend):
    grids = [(4, 3, 3), (2, 5, 5)]
    kept = ck.select_tokens(torch.randn(86), torch.randn(6), grids, num_tokens=[36, 1])
    assert kept.lengths == (36, 1)
    assert kept.indices[:36].tolist() == list(range(36))
    assert ck.select_tokens(torch.randn(86), torch.randn(6), torch.tensor(grids), num_tokens=7).lengths == (7, 7)


def test_selection_helpers(backend):
    kept = ck.select_tokens(torch.randn(20), None, [(2, 2, 3), (4, 1, 2)], num_tokens=[5, 2])
    assert kept.cu_seqlens.tolist() == [0, 5, 7]
    assert kept.num_tokens == 20
    assert torch.equal(kept.mask().nonzero().squeeze(1), kept.indices)
    left, right = kept.padded_indices("left"), kept.padded_indices("right")
    assert left.shape == right.shape == (2, 5)
    assert left[1, :3].tolist() == right[1, 2:].tolist() == [-1, -1, -1]
    assert torch.equal(left[1, 3:], right[1, :2])
    with pytest.raises(ValueError, match="side='top'"):
        kept.padded_indices("top")


def test_within_a_prompt_everything_else_is_kept(backend):
    kept = ck.select_tokens(torch.randn(2, 3, 4), keep_ratio=0.25)
    prompt = torch.zeros(2, 20, dtype=torch.bool)
    prompt[0, 2:14] = True
    prompt[1, 5:17] = True
    whole = kept.within(prompt)
    assert whole.lengths == (11, 11)
    mask = whole.mask().reshape(2, 20)
    assert mask[~prompt].all()
    assert torch.equal(mask[prompt], kept.mask())
    with pytest.raises(ValueError, match=r"marks \[12, 12\] video tokens per row"):
        ck.select_tokens(torch.randn(2, 3, 5), keep_ratio=0.25).within(prompt)
    with pytest.raises(ValueError, match="must be a bool mask"):
        kept.within(prompt.long())


def test_sizes_come_as_any_kind_of_integer_and_leave_as_int(backend):
    tokens, grid, three = torch.randn(48), [(3, 4, 4)], tuple(np.int64(n) for n in (3, 4, 4))
    wanted = ck.select_tokens(tokens, None, grid, num_tokens=7)
    for odd in (np.array(grid), np.array(grid[0]), torch.tensor(grid, dtype=torch.int32), grid[0], three, [three]):
        for count in (np.int64(7), np.array([7]), torch.tensor([7])):
            kept = ck.select_tokens(tokens, None, odd, num_tokens=count)
            assert same(kept, wanted)
            assert {type(n) for n in (*kept.grid_thw[0], *kept.lengths)} == {int}
    assert torch.equal(ck.segmented_topk(tokens, np.int64(2), np.array([0, 48])), ck.segmented_topk(tokens, 2))


def test_a_refused_size_leaves_nothing_behind(backend):
    tokens = torch.randn(13 * 11)  # a grid and counts that no other test has looked up
    for grid in ([(13.0, 1, 11)], torch.tensor([[13.0, 1, 11]]), 143, [None], "grid"):
        with pytest.raises(TypeError, match=r"select_tokens: grid_thw=.* must be integers"):
            ck.select_tokens(tokens, None, grid, keep_ratio=0.21)
    for count in (17.0, [17.0], [[17]], "17", [17.5]):
        with pytest.raises(TypeError, match=r"select_tokens: num_tokens=.* must be integers"):
            ck.select_tokens(tokens, None, [(13, 1, 11)], num_tokens=count)
    with pytest.raises(TypeError, match=r"segmented_topk: k=2\.0 must be integers"):
        ck.segmented_topk(tokens, 2.0)
    with pytest.raises(TypeError, match=r"segmented_topk: k=True must be integers"):
        ck.segmented_topk(tokens, True)
    for name in ("keep_ratio", "importance_ratio", "max_frame_ratio"):
        for value in ("0.21", True, [0.21]):
            ck.topk_tokens(tokens, [(13, 1, 11)], keep_ratio=1.0)  # equal to True, and looked up
            options = {"keep_ratio": 0.21, name: value}
            with pytest.raises(TypeError, match=rf"select_tokens: {name}=.* must be a number\. Pass a float") as caught:
                ck.select_tokens(tokens, None, [(13, 1, 11)], **options)
            assert "\n" not in str(caught.value)
    ck.topk_tokens(tokens, [(13, 1, 11)], num_tokens=1)
    for count in (True, [True]):
        with pytest.raises(
            TypeError, match=r"topk_tokens: num_tokens=(True|\[True\]) must be integers\. Pass Python ints"
        ):
            ck.topk_tokens(tokens, [(13, 1, 11)], num_tokens=count)
    assert ck.select_tokens(tokens, None, [(13, 1, 11)], num_tokens=17).lengths == (17,)
    assert ck.select_tokens(tokens, None, [(13, 1, 11)], keep_ratio=0.21).lengths == (30,)


def test_counts_do_not_depend_on_the_precision_of_the_ratio():
    ratio = np.float16(0.1)
    assert ck.select_tokens(torch.zeros(100, 400), keep_ratio=ratio).lengths == (math.floor(float(ratio) * 40000),)


def test_views_that_negate_lazily(backend):
    lazy = torch.randn(6, 31, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    tokens = lazy.resolve_neg()
    wanted = ck.select_tokens(tokens, tokens[:, 0], keep_ratio=0.3)
    assert same(ck.select_tokens(lazy, lazy[:, 0], keep_ratio=0.3), wanted)
    assert torch.equal(ck.gather_tokens(lazy, torch.tensor([5, 0])), tokens[[5, 0]])


def test_the_default_device_does_not_move_results(backend):
    tokens, frames, index = torch.randn(4, 10), torch.randn(4), torch.tensor([3, 1])
    with torch.device("meta"):
        kept = ck.select_tokens(tokens, frames, keep_ratio=0.3)
        counts = ck.allocate_budget(frames, [(4, 2, 5)], keep_ratio=0.3)
        best = ck.segmented_topk(tokens, 2)
        rows = ck.gather_tokens(tokens, index)
    assert same(kept, ck.select_tokens(tokens, frames, keep_ratio=0.3))
    assert torch.equal(counts, ck.allocate_budget(frames, [(4, 2, 5)], keep_ratio=0.3))
    assert torch.equal(best, ck.segmented_topk(tokens, 2))
    assert torch.equal(rows, tokens[index])


@pytest.mark.parametrize("mode", ["official", "strict"])
@pytest.mark.parametrize("order", ["index", "score"])
def test_nothing_is_read_on_the_host(mode, order):
    """On meta tensors every host read is an error, inside an op too, where no dispatch mode looks."""
    tokens, frames = torch.zeros(7, 12, device="meta"), torch.zeros(7, device="meta")
    with ck.use_backend("reference"):
        kept = ck.select_tokens(tokens, frames, keep_ratio=0.3, mode=mode, order=order)
        assert ck.allocate_budget(frames, [(7, 3, 4)], keep_ratio=0.3, mode=mode).shape == (7,)
        assert ck.segmented_topk(tokens, 2, order=order).shape == (14,)
    assert kept.indices.shape == kept.padded_indices()[0].shape == (25,)
    assert kept.mask().shape == (84,)
    assert kept.cu_seqlens.shape == (2,)
    assert kept.within(torch.zeros(100, dtype=torch.bool, device="meta")).indices.shape == (41,)


# ---- errors -------------------------------------------------------------------------------------

GOOD = (torch.zeros(4, 6), torch.zeros(4))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (GOOD, {}, "exactly one of keep_ratio and num_tokens"),
        (GOOD, {"keep_ratio": 0.5, "num_tokens": 3}, "exactly one of keep_ratio and num_tokens"),
        (GOOD, {"keep_ratio": 0.0}, r"keep_ratio=0.0 must be in \(0, 1\]"),
        (GOOD, {"keep_ratio": 1.5}, r"keep_ratio=1.5 must be in \(0, 1\]"),
        (GOOD, {"keep_ratio": NAN}, r"keep_ratio=nan must be in \(0, 1\]"),
        (GOOD, {"num_tokens": 25}, r"num_tokens=25 must be in \[1, 24\]"),
        (GOOD, {"num_tokens": 0}, r"num_tokens=0 must be in \[1, 24\]"),
        (GOOD, {"num_tokens": [3, 3]}, "num_tokens has 2 entries for 1 videos"),
        (GOOD, {"keep_ratio": 0.5, "importance_ratio": -0.1}, "importance_ratio=-0.1"),
        (GOOD, {"keep_ratio": 0.5, "max_frame_ratio": 0.0}, "max_frame_ratio=0.0 must be a positive"),
        (GOOD, {"keep_ratio": 0.5, "max_frame_ratio": 0.2, "mode": "strict"}, "is below the keep ratio 0.5"),
        (GOOD, {"keep_ratio": 0.5, "mode": "fast"}, r"mode='fast' must be one of .*\. Pass one of these"),
        (GOOD, {"keep_ratio": 0.5, "order": "time"}, "order='time' must be one of"),
        (GOOD, {"keep_ratio": 0.5, "fill": "best"}, "fill='best' must be one of"),
        (GOOD, {"keep_ratio": 0.5, "check": "no"}, "check='no' must be one of"),
        ((torch.zeros(24),), {"keep_ratio": 0.5}, "grid_thw is needed for packed scores"),
        ((torch.zeros(24), None, [(4, 2, 4)]), {"keep_ratio": 0.5}, "each of the 32 tokens"),
        ((torch.zeros(24), None, [(4, 0, 6)]), {"keep_ratio": 0.5}, r"entry \(4, 0, 6\)"),
        ((torch.zeros(24), None, [(4, 6)]), {"keep_ratio": 0.5}, r"entry \(4, 6\)"),
        ((torch.zeros(0, 6),), {"keep_ratio": 0.5}, r"entry \(0, 1, 6\)"),
        ((torch.zeros(1).expand(2**22), None, [(2**22, 1, 1)]), {"keep_ratio": 0.5}, r"fewer than 2\^22 frames"),
        ((torch.zeros(4, 6), torch.zeros(5)), {"keep_ratio": 0.5}, "each of the 4 frames"),
        ((torch.zeros(1, 6), torch.tensor(1.0)), {"keep_ratio": 0.5}, "each of the 1 frames"),
    ],
)
def test_bad_arguments_name_value_and_rule(args, options, message):
    with pytest.raises(ValueError, match=rf"select_tokens: .*{message}") as error:
        ck.select_tokens(*args, **options)
    assert "\n" not in str(error.value)


def test_bad_types():
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16 \(token_scores: \[4, 6\] int64 cpu\)"):
        ck.select_tokens(torch.zeros(4, 6, dtype=torch.long), keep_ratio=0.5)
    with pytest.raises(TypeError, match="token_scores must be a tensor, got list"):
        ck.select_tokens([1.0, 2.0], keep_ratio=0.5)
    with pytest.raises(TypeError, match="must be strided"):
        ck.select_tokens(torch.zeros(4, 6).to_sparse(), keep_ratio=0.5)
    with pytest.raises(ValueError, match=r"grid_thw is on meta; reading it would synchronise"):
        ck.select_tokens(torch.zeros(24), None, torch.zeros(1, 3, device="meta"), keep_ratio=0.5)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((torch.zeros(8), 9), {}, r"k=9 must be in \[0, 8\], the length of segment 0 \(scores: \[8\] float32 cpu\)"),
        ((torch.zeros(8), -1), {}, r"k=-1 must be in"),
        ((torch.zeros(8), 1, [0, 9]), {}, r"cu_seqlens=\[0, 9\] must rise from 0 to N=8\. Pass the starts"),
        ((torch.zeros(8), 1, [0, 5, 4, 8]), {}, "must rise from 0"),
        ((torch.zeros(8), 1, []), {}, "must rise from 0"),
        ((torch.zeros(8), [1, 1], [0, 8]), {}, "k has 2 entries for 1 segments"),
        ((torch.zeros(2, 4), 1, [0, 8]), {}, r"scores must be \[N\] when cu_seqlens is given"),
        ((torch.zeros(2, 2, 2), 1), {}, r"scores must be \[N\] or \[S, P\]"),
    ],
)
def test_segmented_topk_errors(args, options, message):
    with pytest.raises(ValueError, match=rf"segmented_topk: .*{message}"):
        ck.segmented_topk(*args, **options)


def test_engine_refuses_what_would_read_out_of_bounds():
    """The binding checks shapes itself: the core never sees a pointer that it could leave."""
    from cacovid_kernels.native import select as native

    with pytest.raises(ValueError, match="rows of equal length"):
        native.select_tokens(torch.zeros(2, 6), None, [1, 1, 4, 1, 1, 8], [1, 1], 0.5, 0.5, 1.0, False, True, False)
    with pytest.raises(ValueError, match="one float score per token"):
        native.select_tokens(torch.zeros(11), None, [1, 1, 12], [1], 0.5, 0.5, 1.0, False, True, False)
    with pytest.raises(ValueError, match="k must be in"):
        native.segmented_topk(torch.zeros(4), [0, 4], [5], False)
    with pytest.raises(ValueError, match="must not fall"):
        native.segmented_topk(torch.zeros(4), [0, 1, -(2**63)], [0, 0], False)
    with pytest.raises(ValueError, match="has no memory"):
        native.segmented_topk(torch._efficientzerotensor(4), [0, 4], [1], False)
    assert native.segmented_topk(torch.zeros(3, 0, 0), [0, 0], [0], False)[0].numel() == 0  # no division by 0


# ---- segmented top-k ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_segmented_topk_matches_a_stable_sort(dtype, k, backend):
    scores = torch.randn(40).to(dtype)
    bounds = [0, 5, 5, 29, 40] if k == 0 else [0, 5, 29, 40]
    expected = []
    for a, b in itertools.pairwise(bounds):
        expected += (scores[a:b].sort(descending=True, stable=True).indices[:k] + a).tolist()
    assert ck.segmented_topk(scores, k, bounds, order="score").tolist() == expected


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097, 100_003])
def test_long_rows(n, backend):
    scores = torch.randn(n).bfloat16()  # bfloat16: many ties at the boundary
    k = n // 3
    expected = scores.float().sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(ck.segmented_topk(scores, k), expected)


def test_empty_calls(backend):
    assert ck.segmented_topk(torch.zeros(0, 5), 1).tolist() == []
    assert ck.segmented_topk(torch.zeros(5, 0), 0).tolist() == []
    for scores, grid in ((torch.zeros(0), []), (torch.zeros(0, 3, 4), None)):
        kept = ck.select_tokens(scores, None, grid, keep_ratio=0.5)
        assert kept.indices.dtype == torch.int64
        assert (kept.indices.numel(), kept.frame_counts.numel(), kept.status.numel(), kept.lengths) == (0, 0, 0, ())
    assert ck.segmented_topk(torch.zeros(0), 0).tolist() == []
    assert ck.segmented_topk(torch.zeros(0), [], cu_seqlens=[0]).tolist() == []


# ---- properties ---------------------------------------------------------------------------------


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**31 - 1))
    grid = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(DTYPES))
    tokens = torch.randn(sum(t * h * w for t, h, w in grid), generator=generator) * draw(st.sampled_from([0, 1, 50]))
    frames = torch.randn(sum(t for t, _, _ in grid), generator=generator) * draw(st.sampled_from([0, 1, 5]))
    for odd in draw(st.sets(st.sampled_from([NAN, INF, -INF, -0.0]))):
        tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = odd
        frames[torch.rand(frames.shape, generator=generator) < 0.3] = odd
    options = {
        "importance_ratio": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])),
        "mode": draw(st.sampled_from(["official", "strict"])),
        "fill": draw(st.sampled_from(["uniform", "none"])),
        "order": draw(st.sampled_from(["index", "score"])),
    }
    if draw(st.booleans()):
        options["keep_ratio"] = draw(st.floats(0.001, 1.0))
    else:
        options["num_tokens"] = [draw(st.integers(1, t * h * w)) for t, h, w in grid]
    return tokens.to(dtype), frames.to(dtype) if draw(st.booleans()) else None, grid, options


@settings(max_examples=3000, deadline=None, derandomize=True, database=None)
@given(problems())
def test_engine_equals_reference_and_keeps_the_exact_count(problem):
    tokens, frames, grid, options = problem
    reference, engine = both(tokens, frames, grid, **options)
    assert same(reference, engine)
    assert engine.indices.numel() == sum(engine.lengths) == engine.mask().sum()
    per_video = torch.stack([c.sum() for c in engine.frame_counts.split([t for t, _, _ in grid])])
    assert per_video.tolist() == list(engine.lengths)
    if options["order"] == "index":
        assert (engine.indices.diff() > 0).all()


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 300), min_size=1, max_size=6), st.sampled_from(DTYPES))
def test_segmented_topk_engine_equals_reference(seed, lengths, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(sum(lengths), generator=generator) * 2).round().to(dtype)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    k = [int(torch.randint(0, n + 1, (), generator=generator)) for n in lengths]
    results = []
    for name in ("reference", "cpu"):
        with ck.use_backend(name):
            results.append(ck.segmented_topk(scores, k, bounds, order=["index", "score"][seed % 2]))
    assert torch.equal(*results)


# ---- threads, processes, instruction sets -------------------------------------------------------


def test_result_does_not_depend_on_threads(threads):
    generator = torch.Generator().manual_seed(3)
    tokens, frames = torch.randn(400, 77, generator=generator), torch.randn(400, generator=generator)
    assert same(*both(tokens, frames, keep_ratio=0.2))


def test_fork_after_an_op_does_not_hang():
    check_fork(lambda: int(ck.select_tokens(torch.ones(500, 64), keep_ratio=0.5).indices.sum()))


ISA_SCRIPT = """
import torch, cacovid_kernels as ck
generator = torch.Generator().manual_seed(1)
total = 0
for n in (1, 15, 16, 17, 63, 64, 65, 196, 1000):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(9, n, generator=generator).to(dtype)
        for ratio in (0.05, 0.3, 1.0):
            kept = ck.select_tokens(x, torch.randn(9, generator=generator), keep_ratio=ratio).indices
            total = (total * 31 + int((kept * torch.arange(1, len(kept) + 1)).sum())) % (2**61 - 1)
print(ck._C.cpu_isa, total)
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


# ---- torch.compile, opcheck ---------------------------------------------------------------------


def test_opcheck():
    tokens, frames = torch.randn(4, 10), torch.randn(4)
    budget = ([4, 2, 5], [12], 0.3, 0.5, 0.45, False)
    torch.library.opcheck(ops._select_tokens.dispatch, (tokens, frames, *budget, True, False))
    torch.library.opcheck(ops._select_tokens.dispatch, (tokens, None, *budget, True, True))
    torch.library.opcheck(ops._allocate_budget.dispatch, (frames, *budget))
    torch.library.opcheck(ops._segmented_topk.dispatch, (tokens, [0, 10, 20, 30, 40], [1, 2, 3, 0], False))


def test_compiles_whole():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def kept(tokens, frames):
        counts = ck.allocate_budget(frames, [(4, 2, 5)], keep_ratio=0.3)
        best = ck.segmented_topk(tokens, 2)
        chosen = ck.select_tokens(tokens * 2, frames, keep_ratio=0.3)
        helpers = chosen.mask(), chosen.padded_indices(), chosen.cu_seqlens
        return chosen.indices + 1, counts, best, helpers

    tokens, frames = torch.randn(4, 10), torch.randn(4)
    indices, counts, best, (mask, padded, bounds) = kept(tokens, frames)
    assert torch.equal(mask.nonzero().squeeze(1), indices - 1)
    assert torch.equal(padded[0], indices - 1)
    assert bounds.tolist() == [0, 12]
    assert torch.equal(indices, ck.select_tokens(tokens, frames, keep_ratio=0.3).indices + 1)
    assert torch.equal(counts, ck.allocate_budget(frames, [(4, 2, 5)], keep_ratio=0.3))
    assert torch.equal(best, ck.segmented_topk(tokens, 2))


def test_traces_with_symbolic_sizes():
    tokens, frames = torch.randn(4, 10), torch.randn(4)
    for budget in ({"keep_ratio": 0.3}, {"num_tokens": 9}):
        graph = make_fx(lambda a, b: ck.select_tokens(a, b, **budget).indices, tracing_mode="symbolic")(tokens, frames)  # noqa: B023
        assert torch.equal(graph(tokens, frames), ck.select_tokens(tokens, frames, **budget).indices)
    with FakeTensorMode():
        kept = ck.select_tokens(torch.zeros(4, 10), keep_ratio=0.3)
        assert kept.within(torch.zeros(50, dtype=torch.bool)).indices.shape == (22,)
    with pytest.raises(RuntimeError, match=r"Use torch\.compile or torch\.export"):
        torch.jit.trace(ck.gather_tokens, (tokens, torch.tensor([1])), check_trace=False)


def test_scores_that_require_a_gradient_are_fine():
    tokens = torch.randn(4, 10, requires_grad=True)
    assert not ck.select_tokens(tokens, keep_ratio=0.3).indices.requires_grad
