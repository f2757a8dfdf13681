"""No op makes the host wait, and the path of one prompt takes one launch per op."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

from .problems import SOME, normal, on, problems

# Most launches of one call in Triton; in CUDA each is one. The others add what autograd or torch's sort launches, or
# one per kind of video.
LAUNCHES = {
    "select float32": 1, "select bfloat16": 1, "select float16": 1, "budget": 1, "top-k of rows": 1, "gumbel": 1,
    "combinations": 1, "gather": 1, "repack": 1, "paged in place": 2, "paged to free blocks": 2, "frame_pool": 2,
    "attention": 2,
}  # fmt: skip


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


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name in SOME])
def test_launches(gpu, small, backend, name):
    problem = problems(small)[name]
    inputs = on(gpu.device, problem.make(1))
    found = gpu.launches(lambda: problem.run(inputs))
    assert gpu.pick(1, 0) <= found <= (1 if backend == "cuda" else LAUNCHES[name])


def test_helpers_do_not_synchronise(gpu, small):
    """What a selection and combinations offer besides their indices."""
    t, h, w = (2, 3, 3) if small else (32, 14, 14)
    tokens, frames = normal(0, 2, t, h * w).to(gpu.device), normal(1, 2, t).to(gpu.device)
    grid = [(t, h, w)] * 2
    kept = ck.select_tokens(tokens, frames, grid, keep_ratio=0.25)
    drawn = ck.sample_combinations(tokens, frames, grid, num_samples=3, num_frame_samples=2, keep_ratio=0.2, seed=0)
    prompt = torch.ones(2, t * h * w + 7, dtype=torch.bool, device=gpu.device)
    prompt[:, :7] = False

    def helpers() -> list[torch.Tensor]:
        whole = kept.within(prompt)
        one = drawn.selection(1)
        return [
            kept.status, kept.cu_seqlens, kept.mask(), kept.padded_indices(), whole.indices, whole.cu_seqlens,
            drawn.status, drawn.mask(), drawn.frame_mask(), one.indices, one.frame_counts,
        ]  # fmt: skip

    helpers()
    with gpu.no_synchronisation():
        found = helpers()
    assert found[2].sum() == kept.indices.numel()
    assert found[7].sum() == drawn.indices.numel()
