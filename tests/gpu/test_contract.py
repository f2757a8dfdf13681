"""torch.compile sees whole ops, and no value harms the GPU."""

from __future__ import annotations

import math

import pytest
import torch

import cacovid_kernels as ck

from .problems import SCALE, SOME, Problem, Tensors, assert_same, fields, normal, on, problems


@pytest.mark.parametrize("name", [name for name in SOME if name not in ("log_prob", "policy_loss", "gather gradient")])
def test_compiles_whole(gpu, name):
    """With the default compiler. Gradients inside compiled functions are tested on the CPU."""
    problem = problems(True)[name]
    torch._dynamo.reset()
    compiled = gpu.compile(problem.run, mode=None, fullgraph=True)
    for seed in range(2):
        inputs = on(gpu.device, problem.make(seed))
        assert_same(compiled(inputs), problem.run(inputs), problem.close)


def test_one_compilation_serves_8_shapes(gpu):
    def step(tokens: torch.Tensor, frames: torch.Tensor, grid: list) -> torch.Tensor:
        return ck.select_tokens(tokens, frames, grid, keep_ratio=0.25).indices

    torch._dynamo.reset()
    compiled = gpu.compile(step, mode=None, fullgraph=True, dynamic=True)
    compilations = []
    for t in range(3, gpu.pick(11, 6)):
        tokens, frames, grid = normal(t, t * 6).to(gpu.device), normal(t, t).to(gpu.device), [(t, 2, 3)]
        assert torch.equal(compiled(tokens, frames, grid), step(tokens, frames, grid))
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compilations[-1] == compilations[1]


# ---- bad values ---------------------------------------------------------------------------------


def _odd_scores() -> Tensors:
    x = normal(0, 6, 8 if SCALE == "dry" else 200)
    x[0], x[1], x[2], x[3, ::2], x[4, 3] = math.nan, math.inf, -math.inf, -0.0, 1e-42
    return {"tokens": x, "frames": torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3.0])}


def _select(x: Tensors) -> Tensors:
    kept = ck.select_tokens(x["tokens"], x["frames"], keep_ratio=0.3)
    drawn = ck.gumbel_topk(x["tokens"], 3, seed=1)
    found = ck.sample_combinations(
        x["tokens"], x["frames"], num_samples=2, num_frame_samples=2, keep_ratio=0.2, seed=1, mode="strict"
    )
    best = ck.segmented_topk(x["tokens"], 5)
    return {
        **fields(kept, "indices", "frame_counts", "status"),
        **fields(found, "groups", "frame_indices", "log_prob"),
        "best": best,
        "drawn": drawn.indices,
        "probability": drawn.log_prob,
    }


def _rows_out_of_range() -> Tensors:
    far = [2**62, -(2**62), 2**31, 2**32 + 1, -2, -1, 9, 10, 0]
    return {"x": normal(0, 10, 24, dtype=torch.bfloat16), "index": torch.tensor(far), "cache": normal(1, 1, 2, 10, 16)}


def _gather(x: Tensors) -> Tensors:
    inside = x["index"].new_tensor([1, 4, 9])
    keys = [x["cache"], x["cache"].clone()]
    return {
        "gathered": ck.gather_tokens(x["x"], x["index"], dim=0),
        "inside": ck.gather_tokens(x["x"], inside, dim=0),
        "kept": ck.repack_kv((keys, keys), inside)[0][0],
    }


@pytest.mark.parametrize(("make", "run"), [(_odd_scores, _select), (_rows_out_of_range, _gather)])
def test_bad_values_leave_the_gpu_alive(gpu, repeats, make, run):
    inputs = make()
    problem = Problem("", lambda seed: inputs, run, frozenset({"log_prob", "probability"}))
    with ck.use_backend("cpu"):
        wanted = run(inputs)
    for _ in range(repeats(3)):
        assert_same(run(on(gpu.device, inputs)), wanted, problem.close)
    gpu.synchronize()
    assert int(torch.ones(1000, device=gpu.device).sum()) == 1000


def test_a_cache_with_positions_out_of_range(gpu):
    """On a GPU nobody reads the positions on the host: wrong ones give zero rows, and nothing is read out of bounds."""
    cache = normal(1, 1, 2, 10, 16).to(gpu.device)
    keep = torch.tensor([1, 4, 9], device=gpu.device)
    if not gpu.dry:  # the CPU checks positions and raises
        far = torch.tensor([1, 2**40, -7], device=gpu.device)
        (rows,), _ = ck.repack_kv(([cache], [cache.clone()]), far)
        assert torch.equal(rows[:, :, 0], cache[:, :, 1])
        assert not rows[:, :, 1:].any()
    (rows,), _ = ck.repack_kv(([cache], [cache.clone()]), keep)
    gpu.synchronize()
    assert torch.equal(rows, cache[:, :, keep])
