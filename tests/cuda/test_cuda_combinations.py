"""Combinations as a CUDA kernel: the draws of the CPU engine bit for bit, log-probabilities by tolerance."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import cuda
from cacovid_kernels.cuda import combinations
from cacovid_kernels.native import combinations as engine

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN = sorted((Path(__file__).parents[1] / "data" / "combination_space").glob("*.npz"))
EXACT = ("indices", "groups", "frame_indices", "frame_status", "frame_draw_status", "status")
CLOSE = ("log_prob", "frame_log_prob")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_as_engine(tokens, frames=None, grid=None, **options) -> ck.Combinations:
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


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_scores(path):
    """Many samples of the frames whose published distribution the engine is tested against."""
    vector = dict(np.load(path))
    logits, groups = torch.from_numpy(vector["logits"])[None], int(vector["num_groups"])
    draw = max(logits.numel() // groups // 2, 1)
    args = (logits, None, [1, 1, logits.numel()], 65, [draw], [groups], float(vector["max_group_prob"]) * groups)
    args += (0, [1], False, 5, 0, None)
    found, expected = combinations.sample_combinations(*args), engine.sample_combinations(*args)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=3e-6)


def test_published_configuration():
    """25 groups of a frame of 196 tokens, of which four are drawn."""
    found = same_as_engine(randn(5, 196), randn(5), keep_ratio=0.02, num_samples=23, num_frame_samples=8)
    assert found.lengths == (20,)
    assert found.groups[1:].unique().numel() > 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 9.0, 1e30])
def test_sharp_and_flat_scores(dtype, scale):
    """From groups that are all cut to their caps to ties of everything."""
    tokens, frames = randn(2, 90, seed=1) * scale, randn(2, seed=2) * scale
    same_as_engine(tokens.to(dtype), frames.to(dtype), num_samples=40, keep_ratio=0.04)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 63, 64, 65, 97, 128, 200, 257, 729])
def test_frames_of_every_size(tokens):
    """Runs that end early, runs without a rival."""
    same_as_engine(randn(1, tokens, seed=tokens).round(decimals=1), keep_ratio=0.03, num_samples=7)


@pytest.mark.parametrize("largest", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 150])
def test_groups_of_every_size(largest):
    """Every number of lanes per sample, and the block, with groups of two lengths."""
    tokens = 3 * largest - 1 if largest > 1 else 5
    groups, draw = (3, max((largest - 1) // 2, 1)) if largest > 1 else (5, 1)
    for taken in {draw, max(largest - 1, 1)}:
        args = (randn(2, tokens, seed=largest), None, [2, 1, tokens], 20, [taken], [groups], 2.0)
        args += (0, [1], True, 9, 4, None)
        for a, b in zip(combinations.sample_combinations(*args), engine.sample_combinations(*args), strict=True):
            assert torch.equal(a, b) if a.dtype != torch.float32 else torch.allclose(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("frames", [1, 8, 9, 32, 33, 70, 300])
@pytest.mark.parametrize("mode", ["strict", "official"])
def test_videos_of_every_length(frames, mode):
    scores = randn(frames, seed=frames) * 4
    same_as_engine(
        randn(frames, 6), scores, num_samples=2, keep_ratio=0.5, num_frame_samples=20, mode=mode, group_size=1.0
    )


def test_more_samples_than_a_block_holds():
    found = same_as_engine(randn(2, 40), randn(2), num_samples=400, num_frame_samples=300)
    few = ck.sample_combinations(randn(2, 40), randn(2), num_samples=9, keep_ratio=0.1, seed=3)
    assert torch.equal(few.indices, found.indices[:9])


def test_several_rounds_of_a_block():
    same_as_engine(randn(520, 9), num_samples=70, keep_ratio=0.2)
    same_as_engine(randn(1, 40), num_samples=1100, keep_ratio=0.5)
    same_as_engine(randn(40, 2), randn(40), num_samples=1, num_frame_samples=1100, keep_ratio=0.5)


def test_more_videos_than_one_launch_takes():
    pick = random.Random(5)
    grid = [(pick.randint(1, 3), pick.randint(1, 4), pick.randint(1, 9)) for _ in range(80)]
    tokens, frames = randn(sum(t * h * w for t, h, w in grid)), randn(sum(t for t, _, _ in grid))
    same_as_engine(tokens, frames, grid, num_samples=3, keep_ratio=0.2)


def test_layouts():
    tokens, frames, grid = randn(2, 2, 12), randn(2, 2), [(2, 3, 4)] * 2
    wide = torch.zeros(2, 4, 36)[:, ::2, ::3].copy_(tokens)
    tall = torch.zeros(5, 2, 7).permute(1, 2, 0)[:, ::4, 1].copy_(frames)
    turned = torch.zeros(13, 5)[1:, 1:].t().copy_(tokens.reshape(4, 12))
    apart = torch.zeros(96)[::2].copy_(tokens.reshape(-1))
    wanted = same_as_engine(tokens, frames, grid)
    for x, f in ((wide, tall), (turned, frames), (apart, tall), (tokens.reshape(6, 8), frames.reshape(-1))):
        found = same_as_engine(x, f, grid)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.frame_indices, wanted.frame_indices)


@pytest.mark.parametrize("value", [0.0, -0.0, NAN, -INF, INF, 1e-42])
def test_all_scores_alike(value):
    for tokens in (16, 70):  # by lanes, by the block
        scores = torch.full((2, tokens), value)
        same_as_engine(scores, torch.full((2,), value), keep_ratio=0.25, frame_ratio=1.0, num_samples=9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("size", [2.0, 12.0])
def test_odd_scores(share, size):
    tokens, frames = randn(12, 60), randn(12)
    for odd in (NAN, INF, -INF, -0.0):
        tokens[torch.rand(tokens.shape) < share / 4] = odd
        frames[torch.rand(frames.shape) < share / 4] = odd
    same_as_engine(tokens, frames, keep_ratio=0.06, group_size=size, num_samples=30, frame_ratio=0.8)


def test_groups_of_which_nothing_is_drawn():
    for groups in (3, 1):
        args = (randn(2, 80), None, [2, 8, 10], 4, [0], [groups], 1.5, 0, [0], True, 5, 1, None)
        expected, found = engine.sample_combinations(*args), combinations.sample_combinations(*args)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
@pytest.mark.parametrize("step", [0, 2**32 - 1, torch.tensor(2**40 + 7), torch.tensor(-1)])
def test_seeds_and_steps(seed, step):
    same_as_engine(randn(2, 30), randn(2), seed=seed, step=step)


def test_no_videos():
    for scores, grid in ((torch.zeros(0), []), (torch.zeros(0, 3, 4), None)):
        assert same_as_engine(scores, None, grid).indices.shape == (5, 0)
        assert same_as_engine(scores, torch.zeros(0), grid).indices.shape == (5, 0)


@pytest.mark.parametrize("shape", [(1, 2048), (2048, 2)])
def test_the_largest_frames(shape):
    same_as_engine(randn(*shape), randn(shape[0]), num_samples=2, num_frame_samples=2, keep_ratio=0.5)
    if shape == (1, 2048):
        same_as_engine(randn(*shape), num_samples=3, keep_ratio=1 / 4096, group_size=2.0)  # as many groups as tokens


@pytest.mark.parametrize("shape", [(2, 17), (17, 2)])
def test_beyond_the_limit_the_reference_serves(shape, monkeypatch):
    monkeypatch.setattr(cuda.kernels(), "most_combination_tokens", 16)
    monkeypatch.setattr(cuda.kernels(), "most_combination_frames", 16)
    monkeypatch.setattr(cuda.kernels(), "sample_combinations", None)
    same_as_engine(randn(*shape), randn(shape[0]), num_samples=3, num_frame_samples=2)


def test_masks():
    """A bit per token, in words of its frame."""
    for keep, size in ((0.1, 2.0), (0.2, 5.0)):
        grid = [(3, 5, 14), (2, 4, 8), (1, 1, 3)]
        tokens = randn(sum(t * h * w for t, h, w in grid))
        drawn = ck.sample_combinations(tokens, grid_thw=grid, num_samples=6, keep_ratio=keep, group_size=size, seed=1)
        flat = [n for video in grid for n in video]
        masks = torch.full((6, combinations.mask_words(flat)), 0x5A5A5A5A, dtype=torch.int32)
        draws = [max(round(keep * h * w), 1) for _, h, w in grid]
        groups = [max(min(int(1 / keep / size), h * w // k), 1) for (_, h, w), k in zip(grid, draws, strict=True)]
        args = (tokens, None, flat, 6, draws, groups, 2.0, 0, [1] * 3, True, 1, 0, None, masks)
        found = combinations.sample_combinations(*args)
        assert torch.equal(found[0], drawn.indices)
        kept, word, token = drawn.mask(), 0, 0
        assert masks.shape[1] == 3 * 3 + 2 * 1 + 1
        for t, h, w in grid:
            for _ in range(t):
                bits = torch.stack([masks[:, word + i // 32] >> i % 32 & 1 for i in range(h * w)], 1).bool()
                assert torch.equal(bits, kept[:, token : token + h * w])
                if h * w % 32:
                    assert not (masks[:, word + h * w // 32] >> h * w % 32).any()
                word, token = word + -(-h * w // 32), token + h * w


def test_what_the_binding_refuses():
    args = [randn(2, 20), None, [2, 4, 5], 3, [2], [3], 1.5, 0, [1], True, 5, 1, None]
    with pytest.raises(ValueError, match="added_steps"):
        combinations.sample_combinations(*args[:-1], torch.tensor(1.0))
    with pytest.raises(ValueError, match="packed"):
        combinations.sample_combinations(*args, torch.zeros(3, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="masks are for"):
        combinations.sample_combinations(
            randn(1, 2050), None, [1, 1, 2050], 3, [2], [3], 1.5, 0, [1], True, 5, 1, None, torch.zeros(3, 65)
        )
