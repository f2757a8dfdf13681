"""The GPU gives the bits of the CPU engine: published vectors, usual sizes, 12,000 random cases."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

from .problems import SCALE, Problem, assert_same, golden, on, problems
from .random_cases import MOVES, RANDOM, random_case

CHUNK = 50  # random cases per test


def compare(gpu, problem: Problem, seed: int) -> None:
    inputs = problem.make(seed)
    with ck.use_backend("cpu"):
        wanted = problem.run(inputs)
    assert_same(problem.run(on(gpu.device, inputs)), wanted, problem.close)


@pytest.mark.parametrize("name", problems(True))
def test_usual_sizes(gpu, small, name):
    for seed in range(1 if small else 10):
        compare(gpu, problems(small)[name], seed)


CHUNKS = [
    (name, i)
    for name, family in (RANDOM | MOVES).items()
    for i in range(0, family.cases if SCALE == "full" else 1, CHUNK)
]


@pytest.mark.parametrize(("name", "first"), CHUNKS)
def test_random_cases(gpu, repeats, record_property, name, first):
    count = repeats(CHUNK)
    for seed in range(first, first + count):
        compare(gpu, random_case(name, seed, {"full": 16, "cut": 8, "dry": 2}[SCALE]), 0)
    record_property("cases", count)


@pytest.mark.parametrize("name", [name for name in golden("selection") if SCALE == "full" or name[-2:] in ("10", "12")])
def test_published_selection(gpu, name):
    vector = golden("selection")[name]
    t, h, w = (int(n) for n in vector["grid_thw"])
    token, frame = (
        torch.from_numpy(vector[name]).diff(dim=-1).squeeze(-1) for name in ("token_logits", "frame_logits")
    )
    ratios = {key: float(vector[key]) for key in ("keep_ratio", "importance_ratio", "max_frame_ratio")}
    kept = ck.select_tokens(token.to(gpu.device), frame.to(gpu.device), [(t, h, w)], **ratios)
    assert torch.equal(kept.mask().cpu(), torch.from_numpy(vector["mask"]).bool())


@pytest.mark.parametrize("name", list(golden("combination_space"))[: 6 if SCALE == "full" else 1])
def test_published_combination_space(gpu, name):
    """The published probabilities are tested against the reference; here the draws from them."""
    vector = golden("combination_space")[name]
    logits = torch.from_numpy(vector["logits"])
    ratio = 1 / (2 * int(vector["num_groups"]))
    options = {"num_samples": gpu.pick(200, 2), "keep_ratio": ratio, "seed": 1, "mode": "strict"}

    def run(x):
        drawn = ck.sample_combinations(x["logits"], None, [(1, 1, logits.numel())], **options)
        return {name: getattr(drawn, name) for name in ("indices", "groups", "status", "log_prob")}

    compare(gpu, Problem("combinations", lambda seed: {"logits": logits}, run, frozenset({"log_prob"})), 0)
