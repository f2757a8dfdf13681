"""A step that lives on the device draws what the same step as an int draws: captured graphs read it anew."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

STEPS = [0, 1, 77, 2**32 - 1]
LOGITS = torch.linspace(-2, 2, 40).reshape(2, 20)


@pytest.mark.parametrize("step", STEPS)
def test_gumbel_topk(backend, step):
    expected = ck.gumbel_topk(LOGITS, 5, num_samples=3, seed=9, step=step, stream=4)
    for tensor in (torch.tensor(step), torch.tensor([step]), torch.tensor(step + 2**32), torch.tensor(step - 2**32)):
        found = ck.gumbel_topk(LOGITS, 5, num_samples=3, seed=9, step=tensor, stream=4)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("step", STEPS)
def test_sample_combinations(backend, step):
    options = {"num_samples": 4, "keep_ratio": 0.2, "num_frame_samples": 3, "frame_ratio": 0.5, "seed": 9}
    expected = ck.sample_combinations(LOGITS, LOGITS[:, 0], step=step, **options)
    found = ck.sample_combinations(LOGITS, LOGITS[:, 0], step=torch.tensor(step), **options)
    for name in ("indices", "groups", "log_prob", "frame_indices", "frame_log_prob", "status"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("step", [torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, dtype=torch.int32)])
def test_other_tensors_are_refused(step):
    rule = r"step must be an int, or one int64 on cpu \(step: .*\)\. Pass torch\.tensor\(step, device='cpu'\)\."
    with pytest.raises(ValueError, match=f"gumbel_topk: {rule}"):
        ck.gumbel_topk(LOGITS, 5, seed=9, step=step)
    with pytest.raises(ValueError, match=f"sample_combinations: {rule}"):
        ck.sample_combinations(LOGITS, num_samples=2, keep_ratio=0.2, seed=9, step=step)


def test_a_step_on_another_device_is_refused():
    with pytest.raises(ValueError, match="one int64 on cpu"):
        ck.gumbel_topk(LOGITS, 5, seed=9, step=torch.zeros((), dtype=torch.int64, device="meta"))


def test_a_compiled_caller_may_pass_it():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(step):
        return ck.gumbel_topk(LOGITS, 5, seed=9, step=step + 1).indices

    for step in (3, 4):
        assert torch.equal(draw(torch.tensor(step)), ck.gumbel_topk(LOGITS, 5, seed=9, step=step + 1).indices)
