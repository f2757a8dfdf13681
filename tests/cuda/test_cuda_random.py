"""CUDA kernels give the bits of the CPU engine: the random cases that a GPU runs too (`make nightly`: all of them)."""

from __future__ import annotations

import pytest
from gpu.problems import assert_same
from gpu.random_cases import RANDOM, random_case

import cacovid_kernels as ck

FAMILIES = ["combinations", "gather", "paged", "policy_loss", "repack", "sample", "select", "topk"]
CASES, MOST = 200, 16


def check(name: str, seed: int) -> None:
    problem = random_case(name, seed, MOST)
    inputs = problem.make(0)
    with ck.use_backend("cpu"):
        wanted = problem.run({key: x.clone() for key, x in inputs.items()})
    assert_same(problem.run(inputs), wanted, problem.close)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_cases(name):
    for seed in range(CASES):
        check(name, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES)
def test_all_random_cases(name):
    for seed in range(CASES, RANDOM[name].cases):
        check(name, seed)
