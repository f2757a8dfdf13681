"""Budget, selection and fill in Triton kernels: the bits of the CPU engine, in every regime."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.native import select as engine
from cacovid_kernels.reference.select import _fill_ranks
from cacovid_kernels.triton import budget as kernel_budget
from cacovid_kernels.triton import fill, radix, select, topk
from cacovid_kernels.triton.launch import launch

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the published selections those that the interpreter can do: one of 32 frames, and the short ones.
GOLDEN = [Path(__file__).parents[1] / "data" / "selection" / f"selection_{i:02}.npz" for i in (0, 6, 9, 10, 12)]
fill_below, fill_position = fill.fill_below, fill.fill_position


def check(*args, **kwargs) -> ck.Selection:
    """Selects on both backends; the results have to be the same bits."""
    with ck.use_backend("cpu"):
        expected = ck.select_tokens(*args, **kwargs)
    found = ck.select_tokens(*args, **kwargs)
    for field in ("indices", "frame_counts", "frame_status"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    return found


def check_budget(*args, **kwargs) -> torch.Tensor:
    with ck.use_backend("cpu"):
        expected = ck.allocate_budget(*args, **kwargs)
    found = ck.allocate_budget(*args, **kwargs)
    assert torch.equal(found, expected)
    return found


@pytest.fixture
def short(monkeypatch):
    """Long videos and long frames begin at a size that the interpreter can do."""
    monkeypatch.setattr(select, "LONGEST_FRAME", 64)
    monkeypatch.setattr(select, "MOST_FRAMES", 4)
    monkeypatch.setattr(radix, "CHUNK", 32)


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
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    grid = [(draw.randint(1, 6), draw.randint(1, 5), draw.randint(1, 40)) for _ in range(draw.randint(1, 3))]
    grid = grid[:1] * len(grid) if draw.random() < 0.3 else grid
    tokens = torch.randn(sum(t * h * w for t, h, w in grid), generator=generator) * draw.choice([0, 1, 50])
    frames = torch.randn(sum(t for t, _, _ in grid), generator=generator) * draw.choice([0, 1e-40, 1, 5])
    for odd in (NAN, INF, -INF, -0.0, 1e-42):
        if draw.random() < 0.3:
            tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = odd
            frames[torch.rand(frames.shape, generator=generator) < 0.3] = odd
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
    dtype = draw.choice(DTYPES)
    if dtype == torch.bfloat16:  # whose subnormal numbers the interpreter reads wrongly
        tokens[tokens.abs() < 1e-37], frames[frames.abs() < 1e-37] = 0.0, 0.0
    return tokens.to(dtype), frames.to(dtype) if draw.random() < 0.7 else None, grid, options


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed):
    tokens, frames, grid, options = problem(seed)
    check(tokens, frames, grid, **options)


@pytest.mark.parametrize("seed", range(100, 110))
def test_random_calls_in_the_long_regimes(seed, short):
    tokens, frames, grid, options = problem(seed)
    check(tokens, frames, grid, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, -INF, INF])
def test_ties_go_to_the_lower_index(dtype, value):
    kept = check(torch.full((2, 10), value, dtype=dtype), keep_ratio=0.4, importance_ratio=1.0)
    assert kept.indices.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_status_of_frames():
    tokens, frames = torch.zeros(2, 3, 6), torch.zeros(2, 3)
    tokens[0, 1, 2], tokens[1, 0, 5], frames[1, 0], frames[1, 2] = NAN, INF, NAN, INF
    kept = check(tokens, frames, keep_ratio=0.5)
    assert kept.frame_status.tolist() == [0, 1, 0, 3, 0, 2]
    with pytest.raises(ValueError, match=r"video 1 has NAN \| POSINF"):
        ck.allocate_budget(frames, [(3, 2, 3)] * 2, keep_ratio=0.5, check="raise")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 2, 31, generator=generator).to(dtype)
    frames = torch.randn(2, 2, generator=generator).to(dtype)
    wanted = check(tokens, frames, keep_ratio=0.4).indices
    wide = torch.full((5, 3, 70), NAN, dtype=dtype)
    wide[1::2, 1:, 3:65:2] = tokens
    spread = torch.full((4, 9), NAN, dtype=dtype)
    spread[1::2, 2:8:3] = frames
    packed = wide.new_full((400,), NAN)[7 : 7 + 2 * 124 : 2].copy_(tokens.reshape(-1))
    views = {
        torch.float32: [wide[1::2, 1:, 3:65:2], tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0), packed],
        torch.bfloat16: [wide[1::2, 1:, 3:65:2], packed],
        torch.float16: [tokens.flatten(0, 1).t().contiguous().t(), packed],
    }
    for view in views[dtype]:
        grid = None if view.dim() == 3 else [(2, 1, 31)] * 2
        assert torch.equal(check(view, spread[1::2, 2:8:3], grid, keep_ratio=0.4).indices, wanted)
    check(torch.ones(1, dtype=dtype).expand(2, 31), frames[0, :1].expand(2), keep_ratio=0.4)


def test_layouts_of_long_frames(short):
    tokens = torch.randn(2, 3, 150)
    for view in (tokens[:, :, 3:142:2], torch.randn(3, 70, 2).permute(2, 0, 1)):
        check(view, tokens[:, :, 0], keep_ratio=0.3, order="score")
    check(tokens.reshape(-1)[1::2], None, [(2, 5, 15), (2, 1, 150)], keep_ratio=0.3)


@pytest.mark.parametrize("size", [1, 2, 16, 17, 255, 256, 257, 1000])
def test_frame_sizes(size):
    check(torch.randn(2, size), torch.randn(2).abs(), keep_ratio=0.37)
    check(torch.randn(1, size).round(), num_tokens=size, importance_ratio=0.3)
    check(torch.randn(1, size).round(), num_tokens=1, importance_ratio=0.3)


def test_regimes_meet():
    for shape in ((1, 4096), (1, 4097), (2, 9000)):
        tokens = torch.randn(shape).bfloat16()
        for mode, order in (("official", "index"), ("strict", "score")):
            check(tokens, tokens[:, 0], keep_ratio=0.2, mode=mode, order=order)


@pytest.mark.parametrize("scores", [[NAN] * 9, [-INF] * 9, [INF] * 9, [5.0] * 9, [3e38, -3e38, 1.0] * 3, [1e-45] * 9])
def test_frames_without_a_difference(scores):
    frames = torch.tensor(scores)
    for keep in (0.03, 0.5, 1.0):
        check_budget(frames, [(9, 3, 7)], keep_ratio=keep, importance_ratio=0.7)
    check(torch.zeros(9, 21), frames, keep_ratio=0.4, importance_ratio=0.7)


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 1023, 1025, 2500])
def test_budgets(frames):
    generator = torch.Generator().manual_seed(frames)
    for spread in (1.0, 20.0):
        scores = torch.randn(2 * frames + 3, generator=generator) * spread
        scores[torch.rand(scores.shape, generator=generator) < 0.1] = [NAN, -INF][frames % 2]
        scores[frames // 2] = [0.5, INF][frames % 2]
        for keep, importance, mode in ((0.02, 0.5, "official"), (0.6, 1.0, "strict"), (0.9, 0.8, "official")):
            check_budget(
                scores[1:-2].bfloat16() if spread == 1.0 else scores[1:-2], [(frames, 3, 4)] * 2,
                keep_ratio=keep, importance_ratio=importance, mode=mode,
            )  # fmt: skip


HOSTILE = [-1.0, 1e-300, 5e-324, 1e17, 1e300, -1e300, INF, -INF, NAN, 2.0, 1.0 + 1e-15, 0.4]


@pytest.mark.parametrize("seed", range(4))
def test_ratios_that_make_no_sense(seed, monkeypatch):
    """The op below checks nothing but shapes: whatever the ratios, the count is exact and no index is outside."""
    draw = random.Random(seed)
    if seed == 3:
        monkeypatch.setattr(select, "MOST_FRAMES", 2)
    t, h, w = draw.randint(2, 4), draw.randint(1, 4), draw.randint(1, 8)
    keep = draw.randint(0, t * h * w)
    args = [t, h, w], [keep], draw.choice(HOSTILE), draw.choice(HOSTILE), draw.choice(HOSTILE)
    tokens, frames = torch.randn(t * h * w), torch.randn(t)
    for strict, uniform in ((False, True), (True, True), (True, False)):
        expected = engine.select_tokens(tokens, frames, *args, strict, uniform, False)
        found = select.select_tokens(tokens, frames, *args, strict, uniform, False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        expected_budget = engine.allocate_budget(frames, *args, strict)
        found_budget = select.allocate_budget(frames, *args, strict)
        assert all(torch.equal(a, b) for a, b in zip(found_budget, expected_budget, strict=True))


# ---- uniform fill -------------------------------------------------------------------------------


@triton.jit
def fill_kernel(
    bounds, js, below, picked, positions, n, count, last, step, ratio, FLOAT: tl.constexpr, N: tl.constexpr
):
    i = tl.arange(0, N)
    bound = tl.load(bounds + i, mask=i < n, other=0)
    found, is_pick = fill_below(bound, count, last, step, ratio, FLOAT)
    tl.store(below + i, found, mask=i < n)
    tl.store(picked + i, is_pick.to(tl.int64), mask=i < n)
    tl.store(positions + i, fill_position(tl.load(js + i, mask=i < n, other=0), count, last, step, FLOAT), mask=i < n)


def check_fill(unranked: int, count: int, strict: bool) -> None:
    plan = kernel_budget.plan_budget((1, 1, unranked), count, count / unranked, 0.0, 1.0, strict, True)
    positions = _fill_ranks(count, unranked, strict, torch.device("cpu"))
    generator = torch.Generator().manual_seed(count)
    bounds = torch.cat(
        [torch.arange(min(unranked + 1, 300)), torch.randint(0, unranked + 1, (300,), generator=generator)]
    )
    near = positions[torch.randint(0, count, (200,), generator=generator)]  # where picks are
    bounds = torch.cat([bounds, near, near + 1, torch.tensor([unranked - 1, unranked])])
    js = torch.randint(0, count, bounds.shape, generator=generator)
    below, picked, at = (torch.empty_like(bounds) for _ in range(3))
    launch(fill_kernel, (1,), bounds, js, below, picked, at, len(bounds), *plan.picks(), FLOAT=plan.float_ranks, N=1024)
    assert torch.equal(at, positions[js])
    assert torch.equal(below, torch.searchsorted(positions, bounds))
    assert torch.equal(picked.bool(), (below < count) & (positions[below.clamp(max=count - 1)] == bounds))


@pytest.mark.parametrize("strict", [False, True])
def test_fill_of_any_size(strict):
    for unranked in (1, 2, 3, 7, 50, 121):
        for count in {1, 2, unranked // 3, unranked // 2 + 1, unranked - 1, unranked}:
            if 1 <= count <= unranked:
                check_fill(unranked, count, strict)
    draw = random.Random(5)
    for exponent in (10, 16, 20):
        unranked = draw.randint(2**exponent, 2 ** (exponent + 1))
        for share in (0.001, 0.3, 0.95, 0.9999):
            check_fill(unranked, max(1, int(unranked * share)), strict)
    check_fill(2**24 + 1, 2**20, strict)
    check_fill(2**31 + 7, 2**18 + 1, strict)


# ---- launches, host reads, nothing to do --------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that would have been launched; none is."""
    names: list[str] = []
    for module in (select, kernel_budget, radix, topk):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: names.append(kernel.__name__))
    return names


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        assert not masks, name
        return func(*args, **(kwargs or {}))


def test_one_launch_and_no_host_read(launches):
    tokens, frames = torch.randn(3, 5, 14), torch.randn(3, 5)
    grid = [5, 2, 7] * 3
    args = grid, [21] * 3, 0.3, 0.5, 0.45, False
    with NoHostReads():
        select.select_tokens(tokens, frames, *args, True, False)
        assert launches == ["_frames_kernel"]
        select.allocate_budget(frames, *args)
        select.select_tokens(tokens, None, *args, True, True)
    assert launches == ["_frames_kernel", "_budget_kernel", "_frames_kernel"]


def test_runs_of_equal_videos_share_a_launch(launches):
    ragged = [5, 2, 7, 5, 2, 7, 3, 1, 4, 2049, 1, 2, 1, 1, 5000]
    sizes = [70, 70, 12, 4098, 5000]
    args = ragged, [n // 3 for n in sizes], 1 / 3, 0.5, 0.5, False
    with NoHostReads():
        select.select_tokens(torch.zeros(sum(sizes)), torch.zeros(sum(ragged[::3])), *args, True, True)
    own = [name for name in launches if name in ("_frames_kernel", "_budget_kernel", "_chunks_kernel")]
    usual, long_video, long_frame = ["_frames_kernel"], ["_budget_kernel", "_frames_kernel"], ["_budget_kernel"]
    assert own == usual * 2 + long_video + long_frame + ["_chunks_kernel"]


def test_no_videos():
    for scores, grid in ((torch.zeros(0), []), (torch.zeros(0, 3, 4), None)):
        kept = check(scores, None, grid, keep_ratio=0.5)
        assert kept.indices.numel() == kept.frame_counts.numel() == kept.status.numel() == 0
    assert ck.allocate_budget(torch.zeros(0), [], keep_ratio=0.5).numel() == 0


def test_the_family_is_complete():
    assert select.segmented_topk is topk.segmented_topk
    assert ck.segmented_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [1, 2]
