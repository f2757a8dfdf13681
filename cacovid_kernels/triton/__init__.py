"""The GPU backend without a CUDA toolkit: fused Triton kernels, compiled on first use for the GPU at hand. For that
Triton needs a C compiler and the headers of Python.

With `TRITON_INTERPRET=1` in the environment the same kernels run in Triton's interpreter on CPU tensors, which is
slow and meant for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device_type: str | None = None) -> str:
    """Why no kernel can run here, or on tensors of this kind of device; empty if one can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing. Install it with `pip install triton`."
    if INTERPRETED:
        wrong = device_type not in (None, "cpu")
        return f"TRITON_INTERPRET=1 runs kernels on CPU tensors, not on {device_type!r}." if wrong else ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device. Install a CUDA build of torch and a driver, or use backend 'cpu'."
    if device_type not in (None, "cuda"):
        return f"it runs on CUDA tensors, not on {device_type!r}. Move them to a GPU, or use 'auto'."
    return ""
