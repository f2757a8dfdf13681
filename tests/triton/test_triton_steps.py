"""Steps that kernels read on the device: those of captured graphs."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

LOGITS = torch.linspace(-2, 2, 40).reshape(2, 20)


@pytest.mark.parametrize("step", [0, 77, 2**32 - 1])
@pytest.mark.parametrize("chunk", [4096, 8])
def test_gumbel_topk(step, chunk, monkeypatch):
    monkeypatch.setattr("cacovid_kernels.triton.sample.CHUNK", chunk)
    with ck.use_backend("cpu"):
        expected = ck.gumbel_topk(LOGITS, 5, num_samples=3, seed=9, step=step, stream=4).indices
    for value in (step, step + 2**32):
        found = ck.gumbel_topk(LOGITS, 5, num_samples=3, seed=9, step=torch.tensor(value), stream=4).indices
        assert torch.equal(found, expected)


def test_sample_combinations():
    options = {"num_samples": 4, "keep_ratio": 0.2, "num_frame_samples": 3, "frame_ratio": 0.5, "seed": 9}
    with ck.use_backend("cpu"):
        expected = ck.sample_combinations(LOGITS, LOGITS[:, 0], step=6, **options)
    found = ck.sample_combinations(LOGITS, LOGITS[:, 0], step=torch.tensor(6), **options)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.frame_indices, expected.frame_indices)
