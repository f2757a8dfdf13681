"""The GPU backend compiled ahead of time: adapters that allocate outputs and call the CUDA kernels of the module `_C`.

They are in it where it was built with nvcc, and need neither a compiler nor the CUDA toolkit at run time.
"""

from __future__ import annotations

from types import ModuleType

import torch

from cacovid_kernels import native

_kernels: ModuleType | None = getattr(native._C, "cuda", None)
# Built for tests: the kernels run on CPU tensors, on a machine made of one CPU core.
EMULATED = _kernels is not None and _kernels.architectures == "emulated"


def architectures() -> str | None:
    """What the kernels were compiled for, such as "80-real,90", or "emulated"; None where there are none."""
    return None if _kernels is None else _kernels.architectures


def unavailable(device_type: str | None = None) -> str:
    """Why no kernel can run here, or on tensors of this kind of device; empty if one can."""
    if native.unavailable:
        return native.unavailable
    if _kernels is None:
        return "the compiled module has no CUDA kernels. Install with nvcc on the path, or use 'triton'."
    if EMULATED:
        wrong = device_type not in (None, "cpu")
        return (
            f"the module was built with emulated CUDA kernels, for CPU tensors, not {device_type!r}." if wrong else ""
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device. Install a CUDA build of torch and a driver, or use backend 'cpu'."
    if device_type not in (None, "cuda"):
        return f"it runs on CUDA tensors, not on {device_type!r}. Move them to a GPU, or use 'auto'."
    driver, runtime = _kernels.versions()
    if driver // 1000 < runtime // 1000:
        served = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the module was built with CUDA {runtime // 1000}, the driver serves {served}. "
            f"Install a newer driver, or build with an older toolkit."
        )
    return unsupported(_kernels.architectures, torch.cuda.get_device_capability())


def unsupported(architectures: str, capability: tuple[int, int]) -> str:
    """Why kernels for these architectures ("80-real,90") cannot run on a device; empty if they can."""
    built = [(int(name.partition("-")[0]), not name.endswith("-real")) for name in architectures.split(",")]
    here = 10 * capability[0] + capability[1]
    # A cubin runs on its major version from its minor one on; PTX on everything newer.
    if any(here // 10 == a // 10 and here >= a for a, _ in built) or any(ptx and here >= a for a, ptx in built):
        return ""
    return f"its kernels are for sm_{', sm_'.join(str(a) for a, _ in built)}, this GPU is sm_{here}. Use 'triton'."


def kernels() -> ModuleType:
    """The compiled launchers; RuntimeError with cause and remedy where there are none."""
    if _kernels is None:
        raise RuntimeError(f"backend 'cuda' cannot serve: {unavailable()}")
    return _kernels


def queue_of(device: torch.device) -> tuple[int, int]:
    """Number of the device and handle of torch's current stream on it: the last arguments of every launcher."""
    if EMULATED:
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)
