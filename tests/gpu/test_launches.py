"""No op makes the host wait, and the path of one prompt takes one launch per op."""

from __future__ import annotations

import pytest
import torch

from .problems import SOME, on, problems

# A gradient adds what autograd itself launches, rope the tables of angles.
ONE_LAUNCH = [
    "select float32", "select bfloat16", "select float16", "select ragged", "budget", "top-k of rows", "gumbel",
    "combinations", "gather", "repack", "frame_pool",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Outputs are not poisoned here: filling them would count."""


@pytest.mark.parametrize("name", SOME)
def test_no_synchronisation(gpu, small, name):
    problem = problems(small)[name]
    inputs = on(gpu.device, problem.make(1))
    problem.run(inputs)
    gpu.synchronize()
    with gpu.no_synchronisation():
        problem.run(inputs)
    assert gpu.synchronisations(lambda: problem.run(inputs)) == 0


def test_a_synchronisation_would_be_seen(gpu):
    """The check itself works: reading a value is counted."""
    x = torch.ones(3, device=gpu.device)
    assert gpu.synchronisations(lambda: x.sum().item()) >= gpu.pick(1, 0)


@pytest.mark.parametrize("name", [name for name in ONE_LAUNCH if name in SOME])
def test_one_launch(gpu, small, name):
    problem = problems(small)[name]
    inputs = on(gpu.device, problem.make(1))
    assert gpu.launches(lambda: problem.run(inputs)) == gpu.pick(1, 0)
