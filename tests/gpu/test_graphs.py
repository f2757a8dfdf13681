"""CUDA graphs: every op is captured once and replayed over fresh inputs."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

from .problems import SOME, Problem, Tensors, assert_same, bits, combinations, gumbel, on, problems


def replay(gpu, problem: Problem, times: int) -> None:
    """Captures `problem` and replays it `times` times, each with inputs of its own."""
    static = on(gpu.device, problem.make(0))
    captured = gpu.capture(lambda: problem.run(static))
    wrong = torch.zeros((), dtype=torch.int64, device=gpu.device)
    for seed in range(1, times + 1):
        inputs = problem.make(seed)
        with ck.use_backend("cpu"):
            wanted = problem.run(inputs)
        for name, x in inputs.items():
            static[name].copy_(x)
        captured.replay()
        wrong += _differences(gpu, captured.out, wanted, problem.close)
    assert int(wrong) == 0


def _differences(gpu, found: Tensors, wanted: Tensors, close: frozenset[str]) -> torch.Tensor:
    """How many results differ, counted on the GPU."""
    count = torch.zeros((), dtype=torch.int64, device=gpu.device)
    for name, x in found.items():
        y = wanted[name].to(gpu.device)
        if name in close:
            tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
            count += (~torch.isclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)).any()
        else:
            count += (bits(x) != bits(y)).any()
    return count


# Small inputs, so that making 1,000 of them and their answers does not take minutes.
GRAPHED = problems(True)


@pytest.mark.parametrize("name", SOME)
def test_replays_over_fresh_inputs(gpu, repeats, name):
    replay(gpu, GRAPHED[name], repeats(1000))


@pytest.mark.parametrize("name", SOME)
def test_a_usual_size_is_captured(gpu, small, name):
    replay(gpu, problems(small)[name], 1 if small else 10)


@pytest.mark.parametrize("sampler", [gumbel, combinations])
def test_every_replay_draws_fresh_noise(gpu, repeats, sampler):
    """The graph counts its own steps; the scores stay."""
    problem = sampler(True)
    inputs = problem.make(0)
    static = on(gpu.device, inputs)

    def step() -> Tensors:
        static["step"].add_(1)
        return problem.run(static)

    captured = gpu.capture(step)
    before = int(static["step"])
    wrong = torch.zeros((), dtype=torch.int64, device=gpu.device)
    seen = set()
    for i in range(1, max(repeats(1000), 2) + 1):
        with ck.use_backend("cpu"):
            wanted = problem.run({**inputs, "step": torch.tensor(before + i)})
        captured.replay()
        wrong += _differences(gpu, captured.out, wanted, problem.close)
        seen.add(tuple(wanted["indices"].reshape(-1).tolist()))
    assert int(wrong) == 0
    assert len(seen) > 1


def test_ops_of_a_whole_step_in_one_graph(gpu, small, repeats, backend):
    """Scores to selection to compaction, as serving would capture it; with CUDA kernels for what there are some."""
    t, p, size = (2, 4, 16) if small else (32, 196, 3584)
    torch.manual_seed(0)
    heads = [ck.PolicyHead(size).to(gpu.device, torch.bfloat16) for _ in range(2)]
    weight = torch.ones(size, dtype=torch.bfloat16, device=gpu.device)
    hidden = torch.randn(t * p, size, dtype=torch.bfloat16, device=gpu.device)

    def step() -> Tensors:
        with torch.no_grad(), ck.use_backend("auto" if backend == "cuda" else backend):
            tokens, frames = ck.score_tokens(hidden, *heads, [(t, 1, p)], norm_weight=weight)
        kept = ck.select_tokens(tokens, frames, [(t, 1, p)], keep_ratio=0.25)
        return {"rows": ck.gather_tokens(hidden, kept), "indices": kept.indices}

    captured = gpu.capture(step)
    for _ in range(repeats(10)):
        hidden.copy_(torch.randn(t * p, size).to(hidden.dtype))
        captured.replay()
        assert_same(captured.out, step())
        assert torch.equal(captured.out["rows"], hidden[captured.out["indices"]])
