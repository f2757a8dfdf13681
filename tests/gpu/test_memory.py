"""Memory runs out in the middle of an op: an error as torch's own, and everything works again."""

from __future__ import annotations

import pytest
import torch

from .problems import assert_same, on, problems


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """The allocators themselves are under test here."""


# Results of many megabytes; what is smaller may fit into what torch has reserved already.
LARGE = ["gather", "repack", "frame_pool", "gather gradient"]


@pytest.mark.parametrize("name", LARGE)
def test_exhausted_then_usable(gpu, small, name):
    problem = problems(small)[name]
    inputs = on(gpu.device, problem.make(2))
    wanted = problem.run(inputs)

    def until_refused() -> None:
        results = []
        for _ in range(1000):  # what torch has reserved already lasts for a while
            results.append(problem.run(inputs))

    with gpu.out_of_memory(spare=0), pytest.raises(torch.OutOfMemoryError):
        until_refused()
    assert_same(problem.run(inputs), wanted)
    gpu.synchronize()


def test_an_absurd_size_is_refused_and_harmless(gpu, small):
    problem = problems(small)["select float32"]
    inputs = on(gpu.device, problem.make(2))
    wanted = problem.run(inputs)
    if not gpu.dry:  # a CPU would try
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**45, dtype=torch.uint8, device=gpu.device)
    assert_same(problem.run(inputs), wanted)
