"""Which backend serves an op: chosen per call from the device of its tensors, the environment and `use_backend`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache

from torch import Tensor

from cacovid_kernels import _order

# Packages that hold one module per op family, each with the same function names.
PACKAGES = {
    "cpu": "cacovid_kernels.native",
    "cuda": "cacovid_kernels.cuda",
    "triton": "cacovid_kernels.triton",
    "reference": "cacovid_kernels.reference",
}

_forced: ContextVar[str | None] = ContextVar("cacovid_backend", default=None)


def backends() -> dict[str, str]:
    """Names of all backends, each with the reason why it cannot serve here, or an empty string.

    Returns:
        For example `{"cpu": "", "cuda": "torch sees no CUDA device. ...", "triton": "...", "reference": ""}`.

    Example:
        >>> import cacovid_kernels
        >>> cacovid_kernels.backends()["reference"]
        ''
    """
    from cacovid_kernels import cuda, native, triton

    return {
        "cpu": native.unavailable, "cuda": cuda.unavailable(), "triton": triton.unavailable(), "reference": "",
    }  # fmt: skip


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in PACKAGES:
        raise ValueError(f"{where}: backend {name!r} must be one of {['auto', *PACKAGES]}.")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every op inside the `with` block from one backend.

    Args:
        name: "cpu" (the compiled engine), "cuda" (compiled GPU kernels), "triton" (GPU kernels compiled on first use),
            "reference" (plain torch), or "auto": the engine for CPU tensors; for CUDA tensors what the table in
            `_order.py` says for the op and its size, or the other GPU backend where that cannot serve; the reference
            with a warning where none can. The environment variable `CACOVID_BACKEND` sets the same for a whole
            process.

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
    from cacovid_kernels import cuda, native, triton

    if backend == "triton":
        return triton.unavailable(device_type)
    if backend == "cuda":
        return cuda.unavailable(device_type)
    if backend == "cpu" and device_type != "cpu":
        return f"it cannot serve tensors on {device_type!r}. Move them to the CPU, or use 'auto'."
    return native.unavailable if backend == "cpu" else ""


@cache
def _choose(forced: str, device_type: str, order: tuple[str, ...]) -> str:
    backend = _check_name(forced, "CACOVID_BACKEND")
    if backend == "auto":
        for backend in order:
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
    package = PACKAGES[backend]
    found = importlib.util.find_spec(f"{package}.{family}") and importlib.import_module(f"{package}.{family}")
    if not hasattr(found, op):
        raise RuntimeError(f"backend {backend!r} has no kernel for {op}. Use 'auto', which knows who has.")
    return getattr(found, op)


# The usual call, a CPU tensor and nothing forced, must not pay for the general rule.
_cpu_engine_by_default = not os.environ.get("CACOVID_BACKEND") and not backends()["cpu"]


def implementation(family: str, op: str, first: Tensor) -> Callable:
    """The function that serves `op` for tensors on the device of its first."""
    device = first.device
    if _cpu_engine_by_default and device.type == "cpu" and _forced.get() is None:
        return _implementation("cpu", family, op)
    forced = _forced.get() or os.environ.get("CACOVID_BACKEND") or "auto"
    order = ("cpu",) if device.type == "cpu" else _order.order(op, first.numel())
    return _implementation(_choose(forced, device.type, order), family, op)
