"""CUDA kernels on the machine of csrc/tests/simt: the compiled module has to be built for it (`make test` does)."""

from __future__ import annotations

import pytest

import cacovid_kernels as ck
from cacovid_kernels import cuda

if not cuda.EMULATED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _cuda():
    with ck.use_backend("cuda"):
        yield
