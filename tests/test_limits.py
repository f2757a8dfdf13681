"""Arguments at the edge of what integers and memory can hold: a clear error or the right answer, never a crash."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

SCORES = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("ratio", [1e-300, 1e300, 1.7976931348623157e308])
def test_a_frame_cap_of_any_size(backend, ratio):
    kept = ck.select_tokens(SCORES, torch.zeros(3), keep_ratio=0.5, max_frame_ratio=ratio)
    assert kept.indices.numel() == 6
    assert kept.frame_counts.sum() == 6
    assert (kept.indices.diff() > 0).all()


@pytest.mark.parametrize("ratio", [5e-324, 1e-300, 1e-9])
def test_a_keep_ratio_next_to_nothing_keeps_one_token(backend, ratio):
    kept = ck.select_tokens(SCORES, torch.zeros(3), keep_ratio=ratio)
    assert kept.lengths == (1,)
    assert 0 <= kept.indices.item() < 12


@pytest.mark.parametrize("video", [(2**22, 1, 1), (1, 2**31, 1), (2, 2**40, 2**40), (2**21, 2**31, 2**31)])
def test_grids_beyond_the_limits_are_refused_before_anything_is_computed(video):
    with pytest.raises(ValueError, match=r"fewer than 2\^22 frames and 2\^31 tokens\. Split it\."):
        ck.select_tokens(SCORES, torch.zeros(3), [video], keep_ratio=0.5)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` whose memory starts one byte past where its dtype may."""
    storage = torch.empty(x.numel() * x.element_size() + 1, dtype=torch.uint8)
    copy = torch.empty(0, dtype=x.dtype).set_(storage.untyped_storage()[1:], 0, x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_between_addresses_are_refused(dtype):
    scores = misaligned(SCORES.to(dtype))
    assert scores.data_ptr() % dtype.itemsize
    with ck.use_backend("cpu"), pytest.raises(ValueError, match=r"must be aligned to its elements\. Call \.clone\(\)"):
        ck.select_tokens(scores, keep_ratio=0.5)


def test_rows_between_addresses_are_refused():
    rows = misaligned(torch.arange(24.0).reshape(6, 4))
    with ck.use_backend("cpu"), pytest.raises(ValueError, match="must be aligned"):
        ck.gather_tokens(rows, torch.tensor([1, 3]), dim=0)
