"""Kernels in Triton's interpreter, every launch under the guard. Run with TRITON_INTERPRET=1 (`make test` does)."""

from __future__ import annotations

import os

import pytest

import cacovid_kernels as ck

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]  # triton decides at its first import how kernels run
else:
    from guard import guarded

    @pytest.fixture(autouse=True)
    def _triton():
        with guarded(), ck.use_backend("triton"):
            yield
