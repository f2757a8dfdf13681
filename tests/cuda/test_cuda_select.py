"""Budget, selection, fill and top-k as CUDA kernels: the bits of the CPU engine, in every regime."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import cuda
from cacovid_kernels.cuda import select as kernels
from cacovid_kernels.native import select as engine

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN = sorted((Path(__file__).parents[1] / "data" / "selection").glob("*.npz"))
MOST_FRAMES, LONGEST_ROW = 2048, 1024  # of select.cu: beyond them budgets or rows take another way


def check(*args, **kwargs) -> ck.Selection:
    """Selects on both backends; the results have to be the same bits."""
    with ck.use_backend("cpu"):
        expected = ck.select_tokens(*args, **kwargs)
    found = ck.select_tokens(*args, **kwargs)
    for field in ("indices", "frame_counts", "frame_status"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    return found


def check_budget(*args, **kwargs) -> None:
    with ck.use_backend("cpu"):
        expected = ck.allocate_budget(*args, **kwargs)
    assert torch.equal(ck.allocate_budget(*args, **kwargs), expected)


def check_topk(*args, **kwargs) -> None:
    for order in ("index", "score"):
        with ck.use_backend("cpu"):
            expected = ck.segmented_topk(*args, order=order, **kwargs)
        assert torch.equal(ck.segmented_topk(*args, order=order, **kwargs), expected)


def scores(draw: random.Random, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Plain scores, ties, or odd values."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(draw.randrange(2**30))) * draw.choice([1, 1, 0, 50])
    if draw.random() < 0.4:
        x = x.round()
    for odd in (NAN, INF, -INF, -0.0, 1e-42, -1e-42):
        if draw.random() < 0.25:
            x[torch.tensor(draw.choices(range(n), k=1 + n // 4))] = odd
    return x.to(dtype)


@pytest.fixture
def launches(monkeypatch):
    """Counts calls of the compiled launchers, by name."""
    counts: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name):
            counts[name] = counts.get(name, 0) + 1
            return getattr(cuda.kernels(), name)

    monkeypatch.setattr(kernels, "kernels", Counting)
    return counts


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_selection(path):
    vector = dict(np.load(path))
    t, h, w = (int(n) for n in vector["grid_thw"])
    token = torch.from_numpy(vector["token_logits"]).diff(dim=-1).squeeze(-1)
    frame = torch.from_numpy(vector["frame_logits"]).diff(dim=-1).squeeze(-1)
    ratios = {key: float(vector[key]) for key in ("keep_ratio", "importance_ratio", "max_frame_ratio")}
    kept = ck.select_tokens(token, frame, [(t, h, w)], **ratios)
    assert torch.equal(kept.indices, torch.from_numpy(vector["mask"]).nonzero().squeeze(1))


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor | None, list, dict]:
    """Scores, frame scores, grid and options of a random call."""
    draw = random.Random(seed)
    sides = [(draw.choice([1, 3, 33, 70]), draw.randint(1, 6), draw.choice([1, 7, 40, 90])) for _ in range(3)]
    grid = draw.choices(sides, k=draw.randint(1, 4))
    dtype = draw.choice(DTYPES)
    options = {
        "importance_ratio": draw.choice([0.0, 0.3, 0.5, 0.9, 1.0]),
        "mode": draw.choice(["official", "strict"]),
        "fill": draw.choice(["uniform", "uniform", "none"]),
        "order": draw.choice(["index", "index", "score"]),
    }
    if draw.random() < 0.5:
        options["keep_ratio"] = draw.uniform(0.001, 1.0)
    else:
        options["num_tokens"] = [draw.randint(1, t * h * w) for t, h, w in grid]
    tokens = scores(draw, sum(t * h * w for t, h, w in grid), dtype)
    frames = scores(draw, sum(t for t, _, _ in grid), dtype) if draw.random() < 0.8 else None
    return tokens, frames, grid, options


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed):
    tokens, frames, grid, options = problem(seed)
    check(tokens, frames, grid, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, NAN, -INF, INF, 1e-42])
def test_ties_go_to_the_lower_index(dtype, value):
    for length in (10, 70, LONGEST_ROW + 5):
        k = 2 * length // 5
        kept = check(torch.full((2, length), value, dtype=dtype), num_tokens=2 * k, importance_ratio=1.0)
        assert kept.indices.tolist() == [*range(k), *range(length, length + k)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9, 40, LONGEST_ROW + 40])
def test_odd_scores_in_every_order(dtype, length):
    odd = torch.tensor([NAN, -INF, 1.0, -0.0, 0.0, INF, NAN, -INF, -2.0, 6e-8, -6e-8]).to(dtype)
    for seed in range(3):
        x = odd[torch.randint(0, len(odd), (length,), generator=torch.Generator().manual_seed(seed))]
        for k in {0, 1, length // 3, length // 2, length - 1, length}:
            check_topk(x, k)


def test_status_of_frames():
    tokens, frames = torch.zeros(2, 3, 6), torch.zeros(2, 3)
    tokens[0, 1, 2], tokens[1, 0, 5], frames[1, 0], frames[1, 2] = NAN, INF, NAN, INF
    assert check(tokens, frames, keep_ratio=0.5).frame_status.tolist() == [0, 1, 0, 3, 0, 2]
    for length in (31, 32, 256, LONGEST_ROW, LONGEST_ROW + 1):
        for at in (0, length - 1):
            tokens = torch.zeros(3, length)
            tokens[1, at], tokens[2, length - 1 - at] = NAN, INF
            assert check(tokens, keep_ratio=0.5).frame_status.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    tokens, frames = torch.randn(2, 2, 31).to(dtype), torch.randn(2, 2).to(dtype)
    wanted = check(tokens, frames, keep_ratio=0.4).indices
    wide = torch.full((5, 3, 70), NAN, dtype=dtype)
    wide[1::2, 1:, 3:65:2] = tokens
    spread = torch.full((4, 9), NAN, dtype=dtype)
    spread[1::2, 2:8:3] = frames
    packed = wide.new_full((400,), NAN)[7 : 7 + 2 * 124 : 2].copy_(tokens.reshape(-1))
    transposed = tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for view in (wide[1::2, 1:, 3:65:2], transposed, packed, tokens.flatten(0, 1).t().contiguous().t()):
        grid = None if view.dim() == 3 else [(2, 1, 31)] * 2
        assert torch.equal(check(view, spread[1::2, 2:8:3], grid, keep_ratio=0.4).indices, wanted)
    check(torch.ones(1, dtype=dtype).expand(2, 31), frames[0, :1].expand(2), keep_ratio=0.4)
    check(torch.randn(2, LONGEST_ROW + 70, 2).to(dtype).permute(2, 0, 1), keep_ratio=0.3, order="score")


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 255, 256, 257, 512, 513, 1000, 1024, 1025, 1280, 3000])
def test_frame_sizes(size):
    for dtype in DTYPES:
        check(torch.randn(2, size).to(dtype), torch.randn(2).abs(), keep_ratio=0.37)
    check(torch.randn(1, size).round(), num_tokens=size, importance_ratio=0.3)
    check(torch.randn(1, size).round(), num_tokens=1, importance_ratio=0.3)


def test_frames_of_both_kinds_in_one_call():
    grid = [(2, 1, 40), (2, 1, 1100), (1, 1, 2000), (3, 1, 300), (2, 1, 1100)]
    tokens = torch.randn(sum(t * p for t, _, p in grid))
    for order in ("index", "score"):
        check(tokens, torch.randn(10), grid, keep_ratio=0.3, order=order, mode="strict")


@pytest.mark.parametrize("values", [[NAN] * 9, [-INF] * 9, [INF] * 9, [5.0] * 9, [3e38, -3e38, 1.0] * 3, [1e-45] * 9])
def test_frames_without_a_difference(values):
    frames = torch.tensor(values)
    for keep in (0.03, 0.5, 1.0):
        check_budget(frames, [(9, 3, 7)], keep_ratio=keep, importance_ratio=0.7)
    check(torch.zeros(9, 21), frames, keep_ratio=0.4, importance_ratio=0.7)


@pytest.mark.parametrize("frames", [1, 2, 31, 33, 64, 65, 127, 768, MOST_FRAMES, MOST_FRAMES + 1, 5000])
def test_budgets(frames):
    """All widths of a block, and scratch in global memory; counts that fall and that rise, levels of every height."""
    draw = random.Random(frames)
    for keep, importance, mode in ((0.02, 0.5, "official"), (0.6, 1.0, "strict"), (0.9, 0.8, "official")):
        x = scores(draw, 2 * frames + 3, draw.choice(DTYPES))[1:-2]
        for p in (1, 12, 700):
            check_budget(x, [(frames, 1, p)] * 2, keep_ratio=keep, importance_ratio=importance, mode=mode)
    tokens = torch.randn(frames * 12)
    check(tokens, x[:frames], [(frames, 3, 4)], keep_ratio=0.3)


def test_budgets_of_wide_frames():
    for p in (1024, 1 << 20, (1 << 24) - 1):
        x = torch.randn(90)
        check_budget(x, [(90, 1, p)], keep_ratio=0.37, max_frame_ratio=0.5)
        check_budget(x, [(90, 1, p)], keep_ratio=0.9, importance_ratio=1.0, max_frame_ratio=0.01)


def test_more_videos_than_one_launch_takes(launches):
    draw = random.Random(1)
    grid = [(draw.randint(1, 5), 1, draw.randint(1, 40)) for _ in range(75)]
    tokens, frames = torch.randn(sum(t * p for t, _, p in grid)), torch.randn(sum(t for t, _, _ in grid))
    check(tokens, frames, grid, keep_ratio=0.4)
    check_budget(frames, grid, keep_ratio=0.4)
    assert launches.pop("budget_scratch") == 2
    assert launches == {"select_tokens": 1, "allocate_budget": 1}


def test_videos_around_one_of_very_many_frames():
    grid = [(3, 2, 2), (MOST_FRAMES + 2, 1, 2), (4, 1, 9), (MOST_FRAMES + 3, 1, 3), (2, 3, 3)]
    tokens, frames = torch.randn(sum(t * h * w for t, h, w in grid)), torch.randn(sum(t for t, _, _ in grid))
    check(tokens, frames, grid, keep_ratio=0.4)
    check_budget(frames, grid, keep_ratio=0.4)


def test_segments():
    draw = random.Random(3)
    for dtype in DTYPES:
        lengths = [0, 1, 40, 40, 40, 0, 300, 1025, 7, 700] + [draw.randint(0, 60) for _ in range(40)]
        bounds = [0, *np.cumsum(lengths).tolist()]
        x = scores(draw, bounds[-1], dtype)
        check_topk(x, [draw.choice([0, n, draw.randint(0, n)]) for n in lengths], bounds)
    check_topk(torch.randn(40, 196), 20)
    check_topk(torch.randn(3, 200)[:, ::2], 0)
    check_topk(torch.empty(0), [], [0])
    check_topk(torch.empty(4, 0), 0)


HOSTILE = [-1.0, 1e-300, 5e-324, 1e17, 1e300, -1e300, INF, -INF, NAN, 2.0, 1.0 + 1e-15, 0.4]


@pytest.mark.parametrize("seed", range(30))
def test_ratios_that_make_no_sense(seed):
    """The ops below check nothing but shapes: whatever the ratios, the count is exact and no index is outside."""
    draw = random.Random(seed)
    t, h, w = draw.choice([2, 3, 70]), draw.randint(1, 4), draw.randint(1, 8)
    args = [t, h, w], [draw.randint(0, t * h * w)], draw.choice(HOSTILE), draw.choice(HOSTILE), draw.choice(HOSTILE)
    tokens, frames = torch.randn(t * h * w), torch.randn(t)
    for strict, uniform in ((False, True), (True, True), (True, False)):
        expected = engine.select_tokens(tokens, frames, *args, strict, uniform, False)
        found = kernels.select_tokens(tokens, frames, *args, strict, uniform, False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        expected_budget = engine.allocate_budget(frames, *args, strict)
        found_budget = kernels.allocate_budget(frames, *args, strict)
        assert all(torch.equal(a, b) for a, b in zip(found_budget, expected_budget, strict=True))


# ---- everything that a selection can write ------------------------------------------------------


def check_kept(token_scores, frame_scores, grid, num_keep, tokens, *, strict=False, fill=True, ratio=None) -> None:
    flat = [n for video in grid for n in video]
    args = flat, num_keep, ratio, 0.5, None, strict, fill
    indices, frame_counts, frame_status = engine.select_tokens(token_scores, frame_scores, *args, False)
    found = kernels.select_kept(token_scores, frame_scores, *args, tokens)
    for a, b in zip(found, (indices, frame_counts, frame_status), strict=False):
        assert torch.equal(a, b)
    cu_seqlens, mask, positions, rows = found[3:]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *np.cumsum(num_keep).tolist()]
    wanted = torch.zeros(token_scores.numel(), dtype=torch.bool)
    wanted[indices] = True
    assert torch.equal(mask, wanted)
    places = [torch.cartesian_prod(*(torch.arange(n) for n in video)).reshape(-1, 3).t() for video in grid]
    every = torch.cat([torch.zeros(3, 0, dtype=torch.int64), *places], 1)
    assert torch.equal(positions, every[:, indices])
    if tokens is None:
        assert rows.shape == (0,)
        assert rows.dtype == token_scores.dtype
    else:
        assert torch.equal(rows.view(torch.uint8), tokens[indices].contiguous().view(torch.uint8))


@pytest.mark.parametrize("seed", range(30))
def test_everything_kept(seed):
    draw = random.Random(seed)
    grid = [(draw.choice([1, 2, 9]), draw.randint(1, 5), draw.choice([1, 8, 40])) for _ in range(draw.randint(0, 4))]
    grid += [(2, 3, 400)] if seed % 5 == 0 else []
    n = sum(t * h * w for t, h, w in grid)
    num_keep = [draw.randint(0, t * h * w) for t, h, w in grid]
    frames = torch.randn(sum(t for t, _, _ in grid)) if seed % 3 else None
    columns = draw.choice([0, 1, 3, 7, 8, 64, 200, 513])
    tokens = torch.randint(-(2**15), 2**15, (n, columns), dtype=torch.int16) if seed % 4 else None
    check_kept(torch.randn(n), frames, grid, num_keep, tokens, strict=seed % 2 == 0, fill=seed % 7 > 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 8])
def test_rows_of_every_alignment_and_stride(dtype, start):
    for columns in (16, 17):
        storage = torch.randint(0, 256, (40 * 40 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        views = [storage[start : start + 40 * columns].view(40, columns)]
        views += [storage.view(40, 40)[:, start : start + columns], storage[: 40 * columns].view(columns, 40).t()]
        views += [storage.view(40, 40)[:1, :columns].expand(40, columns)]
        for view in views:
            check_kept(torch.randn(40), None, [(2, 4, 5)], [9], view)


def test_wide_rows_are_dealt_to_many_warps():
    tokens = torch.randn(3 * 50, 3600)
    check_kept(torch.randn(3, 50), torch.randn(3), [(3, 5, 10)], [60], tokens)
    check_kept(torch.randn(1, 1500), None, [(1, 1, 1500)], [400], torch.randn(1500, 600).bfloat16())


def test_refuses_what_does_not_fit():
    args = [1, 2, 3], [2], None, 0.5, None, False, True
    with pytest.raises(ValueError, match="tokens must be"):
        kernels.select_kept(torch.randn(6), None, *args, torch.randn(5, 4))
    with pytest.raises(ValueError, match="one float score per token"):
        kernels.select_tokens(torch.randn(7), None, *args, False)
    with pytest.raises(ValueError, match="num_keep"):
        kernels.select_tokens(torch.randn(6), None, [1, 2, 3], [7], None, 0.5, None, False, True, False)
