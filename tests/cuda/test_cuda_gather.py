"""Gather of rows as CUDA kernels."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck


def same_as_engine(tensors, index, **options):
    with ck.use_backend("cpu"):
        wanted = ck.gather_tokens(tensors, index, **options)
    found = ck.gather_tokens(tensors, index, **options)
    if isinstance(tensors, torch.Tensor):
        found, wanted = [found], [wanted]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("columns", [1, 3, 7, 8, 64, 96, 128, 200, 513, 1000, 1792])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_rows_of_every_width(columns, dtype):
    """Every width of an access, and tiles that end inside a row."""
    x = torch.randint(0, 256, (50, columns * dtype.itemsize), dtype=torch.uint8).view(dtype)
    same_as_engine(x, torch.randint(-1, 50, (37,)), dim=0)


@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
def test_alignment_decides_the_width(start):
    storage = torch.randint(0, 256, (40 * 64 + 16,), dtype=torch.uint8)
    x = storage[start : start + 40 * 64].view(40, 64)
    same_as_engine(x, torch.randint(0, 40, (33,)), dim=0)


def test_more_tensors_than_one_launch_takes():
    tensors = [torch.randn(30, 1 + i) for i in range(19)]
    same_as_engine(tensors, torch.randint(0, 30, (11,)), dim=0)


def test_axes_around_the_tokens():
    x = torch.randn(2, 3, 20, 4, 5)
    for dim in range(5):
        for view in (x, x.transpose(0, 4), x[:, :, ::2], x.permute(4, 2, 0, 1, 3)):
            same_as_engine(view, torch.randint(-1, view.shape[dim], (9,)), dim=dim)
    same_as_engine(x[:, :1].expand(2, 3, 20, 4, 5), torch.tensor([4, 4, 0]), dim=2)


@pytest.mark.parametrize("wrong", [-1, -2, 20, 2**31, -(2**62), 2**62])
def test_an_index_out_of_range_gives_zeros(wrong):
    x = torch.randn(20, 24)
    found = ck.gather_tokens(x, torch.tensor([3, wrong, 5]), dim=0)
    assert torch.equal(found, torch.stack([x[3], torch.zeros(24), x[5]]))


def test_empty_results():
    assert ck.gather_tokens(torch.randn(5, 3), torch.zeros(0, dtype=torch.int64), dim=0).shape == (0, 3)
    assert ck.gather_tokens(torch.randn(5, 0), torch.tensor([1]), dim=0).shape == (1, 0)
    assert ck.gather_tokens(torch.randn(0, 3), torch.tensor([0]), dim=0).tolist() == [[0.0, 0.0, 0.0]]


def test_into_given_memory():
    x, index = torch.randn(20, 24), torch.tensor([3, 9])
    out = torch.full((24, 2), 7.0).t()
    ck.gather_tokens(x, index, dim=0, out=out)
    assert torch.equal(out, x[index])
