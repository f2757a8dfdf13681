"""Combinations in Triton kernels: the draws of the CPU engine bit for bit, log-probabilities by tolerance."""

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
from cacovid_kernels.native import combinations as engine
from cacovid_kernels.reference import combinations as reference
from cacovid_kernels.triton import combination_space, combinations
from cacovid_kernels.triton.exact import double_of
from cacovid_kernels.triton.launch import block, double_bits, launch

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN = sorted((Path(__file__).parents[1] / "data" / "combination_space").glob("*.npz"))
EXACT = ("indices", "groups", "frame_indices", "frame_status", "frame_draw_status", "status")
CLOSE = ("log_prob", "frame_log_prob")
cap_shares, group_space, ranked_words, token_weights = (
    combination_space.cap_shares, combination_space.group_space, combination_space.ranked_words,
    combination_space.token_weights,
)  # fmt: skip
word_key, word_index = combination_space.word_key, combinations.word_index
_race_word, _finish_race, _order_log_prob = (
    combinations._race_word, combinations._finish_race, combinations._order_log_prob,
)  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(tokens, frames=None, grid=None, **options) -> ck.Combinations:
    """Samples on both backends; everything drawn has to be the same."""
    options = {"num_samples": 5, "keep_ratio": 0.1, "seed": 3, **options}
    if frames is not None:
        options = {"num_frame_samples": 4, "frame_ratio": 0.4, **options}
    with ck.use_backend("cpu"):
        expected = ck.sample_combinations(tokens, frames, grid, **options)
    found = ck.sample_combinations(tokens, frames, grid, **options)
    for name in EXACT:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in CLOSE:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=3e-6)
    return found


# ---- the space ----------------------------------------------------------------------------------


@triton.jit
def cap_kernel(share, count, cap, out, G: tl.constexpr):
    g = tl.arange(0, G)
    row = tl.program_id(0)
    n = tl.load(count + row)
    tl.store(out + row * G + g, cap_shares(tl.load(share + row * G + g), n, double_of(tl.load(cap + row))))


def test_caps_are_the_reference_s_bit_for_bit():
    rows, groups = 20, 16
    spread = torch.tensor([0.0, 1.0, 5.0, 40.0]).repeat(rows // 4)[:, None].double()
    share = (randn(rows, groups).double() * spread).softmax(1).sort(1, descending=True).values
    count = torch.arange(rows, dtype=torch.int32) % groups + 1
    cap = [(0.1, 0.5, 2 / (n + 1), 1.0, 1e-6)[i % 5] for i, n in enumerate(count.tolist())]
    found = torch.empty(rows, groups, dtype=torch.float64)
    bits = torch.tensor([double_bits(c) for c in cap])
    launch(cap_kernel, (rows,), share, count, bits, found, G=groups)
    for i in range(rows):
        assert torch.equal(found[i], reference.cap_shares(share[i : i + 1], count[i : i + 1].long(), cap[i])[0]), i


@triton.jit
def space_kernel(scores, memory, tokens, size, remainder, groups, cap, share, order, weight,
                 P: tl.constexpr, G: tl.constexpr):  # fmt: skip
    word = ranked_words(scores, 1, tokens, P)
    probability, scale = group_space(word, memory, tokens, 1, size, remainder, groups, double_of(cap), G)
    g, rank = tl.arange(0, G), tl.arange(0, P)
    tl.store(share + g, probability, mask=g < groups)
    tl.store(order + rank, word_index(word), mask=rank < tokens)
    last = remainder * (size + 1)
    group = tl.where(rank < last, rank // (size + 1), remainder + (rank - last) // size)
    scale = tl.gather(scale, tl.minimum(group, G - 1), 0)
    inside = token_weights(word_key(word), tl.max(word_key(word), 0), scale, size)
    tl.store(weight + rank, inside, mask=rank < tokens)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_space(path):
    vector = dict(np.load(path))
    logits, groups = torch.from_numpy(vector["logits"]), int(vector["num_groups"])
    n, cap = logits.numel(), float(vector["max_group_prob"])
    share, order, weight = torch.empty(groups, dtype=torch.float64), torch.empty(n, dtype=torch.int64), torch.empty(n)
    memory = torch.empty(block(n), dtype=torch.int64)
    args = (logits, memory, n, n // groups, n % groups, groups, double_bits(cap), share, order, weight)
    launch(space_kernel, (1,), *args, P=block(n), G=block(groups))
    assert np.abs(share.numpy() - vector["group_prob"]).max() < 1e-6
    group, probability, expected = reference.combination_space(logits[None], 1, groups, cap)
    assert torch.equal(share, probability[0])
    assert torch.equal(weight, expected[0][order])
    assert (group[0][order].diff() >= 0).all()


# ---- races --------------------------------------------------------------------------------------


@triton.jit
def race_kernel(key, item, weight, out, won_out, log_prob, k, W: tl.constexpr):
    row, slot = tl.arange(0, 2)[:, None], tl.arange(0, W)[None, :]
    at = row * W + slot
    chance = tl.load(weight + at) > 0
    word = tl.where(chance, _race_word(tl.load(key + at), tl.load(item + at), slot), -1)
    item, place, raced, won = _finish_race(word, k)
    tl.store(out + at, tl.where(won, item, -1))
    tl.store(won_out + at, won.to(tl.int32))
    weights = tl.load(weight + row * W + place, mask=raced, other=0.0)
    tl.store(log_prob + tl.arange(0, 2), _order_log_prob(weights, won))


@pytest.mark.parametrize("k", [0, 1, 5, 16])
def test_ties_of_a_race_go_to_the_lower_item(k):
    key = torch.tensor([[7, 0xFFFFFFFF, 7, 0, 7, 2**31, 7, 0] * 2, list(range(16))])
    item = torch.stack([torch.arange(16).flip(0) * 273, torch.arange(16)]).int()  # up to 4095
    weight = randn(2, 16).exp()
    weight[:, 11] = 0  # is not in the race
    out, won = (torch.empty(2, 16, dtype=torch.int32) for _ in range(2))
    log_prob = torch.empty(2, dtype=torch.float64)
    launch(race_kernel, (1,), key, item, weight, out, won, log_prob, k, W=16)
    for row in range(2):
        racers = [i for i in range(16) if weight[row, i] > 0]
        order = sorted(racers, key=lambda i: (-int(key[row, i]), int(item[row, i])))[:k]
        assert out[row].tolist() == item[row][order].tolist() + [-1] * (16 - len(order))
        assert won[row].sum() == len(order)
        expected = ck.pl_log_prob(weight[row].double().log(), torch.tensor(order + [-1] * (k - len(order)), dtype=int))
        torch.testing.assert_close(log_prob[row], expected.sum(), rtol=1e-5, atol=1e-6)


# ---- against the engine -------------------------------------------------------------------------


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, list, dict]:
    """Scores, frame scores, grid and options of a random call."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    grid = [(pick.randint(1, 3), pick.randint(1, 4), pick.randint(1, 15)) for _ in range(pick.randint(1, 2))]
    grid = grid[:1] * len(grid) if pick.random() < 0.5 else grid
    tokens = torch.randn(sum(t * h * w for t, h, w in grid), generator=generator) * pick.choice([0, 1e-4, 1, 9, 1e30])
    frames = torch.randn(sum(t for t, _, _ in grid), generator=generator) * pick.choice([0, 1, 5, 60])
    for odd in (NAN, INF, -INF, -0.0):
        if pick.random() < 0.3:
            tokens[torch.rand(tokens.shape, generator=generator) < pick.choice([0.1, 0.9])] = odd
            frames[torch.rand(frames.shape, generator=generator) < pick.choice([0.3, 0.9])] = odd
    options = {
        "num_samples": pick.choice([1, 2, 5, 9]), "num_frame_samples": pick.choice([0, 1, 4, 9]),
        "keep_ratio": pick.choice([0.02, 0.1, 0.3, 1.0]), "group_size": pick.choice([1.0, 2.0, 4.5]),
        "max_group_prob": pick.choice([1.2, 2.0, 9.0]), "frame_ratio": pick.choice([0.1, 0.5, 1.0]),
        "seed": pick.choice([0, 1, -1, 2**63 + 5, 12345678901]), "step": pick.choice([0, 1, 2**32 - 1]),
    }  # fmt: skip
    dtype = pick.choice(DTYPES)
    return tokens.to(dtype), frames.to(pick.choice(DTYPES)), grid, options


@pytest.mark.parametrize("seed", range(16))
def test_random_calls(seed, monkeypatch):
    tokens, frames, grid, options = problem(seed)
    monkeypatch.setattr(combinations, "PROGRAMS", (1024, 1)[seed % 2])  # 1: all blocks of samples in one program
    check(tokens, frames, grid, **options)


@pytest.mark.parametrize("seed", range(3))
def test_official_frames(seed):
    check(
        randn(4, 9, seed=seed),
        randn(4, seed=seed) * 9,
        num_samples=1,
        mode="official",
        num_frame_samples=7,
        frame_ratio=0.6,
    )


def test_published_configuration():
    """25 groups of a frame of 196 tokens, of which four are drawn."""
    found = check(randn(2, 196), randn(2), keep_ratio=0.02, num_samples=7)
    assert found.lengths == (8,)
    assert found.groups[1:].unique().numel() > 1


@pytest.mark.parametrize(("tokens", "keep", "size"), [(70, 0.5, 2.0), (65, 0.016, 2.0), (20, 1.0, 2.0), (40, 0.3, 1.0)])
def test_groups_of_any_size(tokens, keep, size):
    """One group of all tokens, groups of one token to draw, all tokens drawn, groups drawn whole."""
    check(randn(1, tokens), keep_ratio=keep, group_size=size, num_samples=3)


def test_a_video_of_many_frames():
    """Frame combinations in blocks wider than those of the tokens."""
    check(randn(20, 3), randn(20), keep_ratio=0.5, num_samples=2, num_frame_samples=3)


def test_many_samples_in_a_program(monkeypatch):
    monkeypatch.setattr(combinations, "PROGRAMS", 3)
    found = check(randn(2, 33), randn(2), keep_ratio=0.1, num_samples=40, num_frame_samples=33)
    few = ck.sample_combinations(randn(2, 33), randn(2), num_samples=9, keep_ratio=0.1, seed=3)
    assert torch.equal(few.indices, found.indices[:9])


def test_layouts():
    tokens, frames, grid = randn(2, 2, 12), randn(2, 2), [(2, 3, 4)] * 2
    wide = torch.zeros(2, 4, 36)[:, ::2, ::3].copy_(tokens)
    tall = torch.zeros(5, 2, 7).permute(1, 2, 0)[:, ::4, 1].copy_(frames)
    turned = torch.zeros(13, 5)[1:, 1:].t().copy_(tokens.reshape(4, 12))
    apart = torch.zeros(96)[::2].copy_(tokens.reshape(-1))
    wanted = check(tokens, frames, grid)
    for x, f in ((wide, tall), (turned, frames), (apart, tall), (tokens.reshape(6, 8), frames.reshape(-1))):
        found = check(x, f, grid)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.frame_indices, wanted.frame_indices)


def test_frames_of_equal_tokens_in_videos_of_different_length():
    check(randn(5, 12), randn(5), [(2, 3, 4), (1, 4, 3), (2, 3, 4)])


@pytest.mark.parametrize("value", [0.0, -0.0, NAN, -INF, INF, 1e-42])
def test_all_scores_alike(value):
    found = check(torch.full((2, 16), value), torch.full((2,), value), keep_ratio=0.25, frame_ratio=1.0)
    if value not in (-INF, INF) and value == value:
        assert found.indices[0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]


def test_groups_of_which_nothing_is_drawn():
    args = (randn(2, 20), None, [2, 4, 5], 4, [0], [3], 1.5, 0, [1], True, 5, 1, None)
    expected, found = engine.sample_combinations(*args), combinations.sample_combinations(*args)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=3e-6)


def test_status_of_frames():
    tokens = torch.zeros(4, 20)
    tokens[1, 3], tokens[2, 4], tokens[3, 2:] = NAN, INF, -INF
    found = check(tokens, torch.tensor([NAN, -INF, 0.0, INF]), keep_ratio=0.2, frame_ratio=0.8)
    assert found.frame_status.tolist() == [0, ck.Status.NAN, ck.Status.POSINF, ck.Status.SHORT]
    assert found.frame_draw_status.tolist() == [ck.Status.NAN | ck.Status.POSINF | ck.Status.SHORT]


# ---- launches, host reads -----------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Grids of the launches, of which none runs."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(combinations, "launch", lambda kernel, grid, *args, **kwargs: grids.append(grid))
    return grids


class NoHostReads(TorchDispatchMode):
    """Fails on what waits for a device, or would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(read in name for read in ("_local_scalar_dense", "nonzero", "_to_copy", "lift_fresh")), name
        if "aten.index" in name:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


def call(tokens, frames, grid, samples, frame_samples):
    videos = len(grid) // 3
    per_video = ([2] * videos, [3] * videos, 1.5, frame_samples, [1] * videos)
    with NoHostReads():
        return combinations.sample_combinations(tokens, frames, grid, samples, *per_video, True, 0, 0, None)


def test_one_launch_and_no_host_read(launches):
    call(torch.zeros(32, 196), torch.zeros(32), [32, 14, 14], 23, 8)
    assert len(launches) == 1
    assert launches[0][0] <= 400
    call(torch.zeros(2, 3, 40), None, [3, 5, 8] * 2, 4, 0)
    assert len(launches) == 2


def test_a_launch_per_run_of_equal_videos(launches):
    call(torch.zeros(5 * 20 + 2 * 30), torch.zeros(7), [2, 4, 5, 2, 5, 4, 2, 5, 6, 1, 4, 5], 4, 2)
    assert len(launches) == 3


def test_many_frames_get_few_programs(launches):
    call(torch.zeros(5000, 20), None, [5000, 4, 5], 1000, 0)
    call(torch.zeros(20), None, [1, 4, 5], 100_000, 0)
    assert launches[0] == (5000,)
    assert launches[1][0] <= combinations.PROGRAMS


def test_no_videos():
    for scores, grid in ((torch.zeros(0), []), (torch.zeros(0, 3, 4), None)):
        assert check(scores, None, grid).indices.shape == check(scores, torch.zeros(0), grid).indices.shape == (5, 0)


@pytest.mark.parametrize("shape", [(2, 17), (17, 2)])
def test_beyond_the_limit_the_reference_serves(shape, monkeypatch):
    monkeypatch.setattr(combinations, "MOST_TOKENS", 16)
    monkeypatch.setattr(combinations, "MOST_FRAMES", 16)
    monkeypatch.setattr(combinations, "launch", None)
    check(randn(*shape), randn(shape[0]), num_samples=3, num_frame_samples=2)
