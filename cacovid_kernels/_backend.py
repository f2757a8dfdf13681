"""Which backend serves an op: chosen per call from the device of its tensors, the environment and `use_backend`."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache

import torch

# Packages that hold one module per op family, each with the same function names.
PACKAGES = {
    "cpu": "cacovid_kernels.native",
    "triton": "cacovid_kernels.triton",
    "reference": "cacovid_kernels.reference",
}

_forced: ContextVar[str | None] = ContextVar("cacovid_backend", default=None)


def backends() -> dict[str, str]:
    """Names of all backends, each with the reason why it cannot serve here, or an empty string.

    Returns:
        For example `{"cpu": "", "triton": "torch sees no CUDA device. ...", "reference": ""}`.

    Example:
        >>> import cacovid_kernels
        >>> cacovid_kernels.backends()["reference"]
        ''
    """
    from cacovid_kernels import native, triton

    return {"cpu": native.unavailable, "triton": triton.unavailable(), "reference": ""}


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in PACKAGES:
        raise ValueError(f"{where}: backend {name!r} must be one of {['auto', *PACKAGES]}.")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every op inside the `with` block from one backend.

    Args:
        name: "cpu" (the compiled engine), "triton" (GPU kernels), "reference" (plain torch), or "auto": the engine
            for CPU tensors, Triton for CUDA tensors, the reference with a warning where neither can serve. The
            environment variable `CACOVID_BACKEND` sets the same for a whole process.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: on the first op, if the backend cannot serve it; the message says why.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> with ck.use_backend("reference"):
        ...     ck.segmented_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)
        tensor([1, 2])
    """
    token = _forced.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _cannot_serve(backend: str, device_type: str) -> str:
    """Why a backend cannot serve tensors of this kind of device, with the remedy; empty if it can."""
    from cacovid_kernels import native, triton

    if backend == "triton":
        return triton.unavailable(device_type)
    if backend == "cpu" and device_type != "cpu":
        return f"it cannot serve tensors on {device_type!r}. Move them to the CPU, or use 'auto'."
    return native.unavailable if backend == "cpu" else ""


@cache
def _choose(forced: str, device_type: str) -> str:
    backend = _check_name(forced, "CACOVID_BACKEND")
    if backend == "auto":
        backend = "cpu" if device_type == "cpu" else "triton"
        reason = _cannot_serve(backend, device_type)
        if not reason:
            return backend
        warnings.warn(
            f"cacovid_kernels answers through its slow reference backend, {backend!r} cannot serve here: {reason}",
            stacklevel=6,  # of the public function's caller
        )
        return "reference"
    reason = _cannot_serve(backend, device_type)
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot serve here: {reason}")
    return backend


@cache
def _implementation(backend: str, family: str, op: str) -> Callable:
    return getattr(importlib.import_module(f"{PACKAGES[backend]}.{family}"), op)


# The usual call, a CPU tensor and nothing forced, must not pay for the general rule.
_cpu_engine_by_default = not os.environ.get("CACOVID_BACKEND") and not backends()["cpu"]


def implementation(family: str, op: str, device: torch.device) -> Callable:
    """The function that serves `op` for tensors on `device`."""
    if _cpu_engine_by_default and device.type == "cpu" and _forced.get() is None:
        return _implementation("cpu", family, op)
    forced = _forced.get() or os.environ.get("CACOVID_BACKEND") or "auto"
    return _implementation(_choose(forced, device.type), family, op)
