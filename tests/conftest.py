"""Shared fixtures: every backend, and outputs that start as garbage so that an unwritten element fails a test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

import cacovid_kernels as ck

# The same cases on every run: a failure is a change of the code.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

POISON = {torch.int64: -(2**62), torch.int32: -(2**30), torch.bool: True, torch.uint8: 173}


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Runs the test once per backend."""
    with ck.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        if out.device.type == "cpu" and not isinstance(out, torch._subclasses.FakeTensor):
            out.fill_(float("nan") if out.dtype.is_floating_point else POISON.get(out.dtype, 77))
        return out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request):
    """Runs the test under each thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
