"""The CPU engine: adapters that allocate outputs and call the compiled module `cacovid_kernels._C`."""

from __future__ import annotations

from types import ModuleType

import torch

CPU = torch.device("cpu")  # named at every allocation: torch.set_default_device and `with device:` must not move one

try:
    import cacovid_kernels._C as _C

    unavailable = ""
except ImportError as error:  # a pure-Python checkout, or a platform without a compiler
    _C = None  # type: ignore[assignment]
    unavailable = f"the compiled module cacovid_kernels._C is missing ({error}). Install with `pip install .`."


def engine() -> ModuleType:
    """The compiled module; RuntimeError with cause and remedy where there is none."""
    if _C is None:
        raise RuntimeError(f"backend 'cpu' cannot serve: {unavailable}")
    return _C


def num_threads() -> int:
    """Threads an op may use: torch's own setting, so that one knob governs both."""
    return torch.get_num_threads()
