"""Compiles every kernel for GPUs that are not there and prints what the compiler made of it.

    python tests/triton/aot.py [80 90 100] [--family select]

Each family lists calls of the public functions in `specimens/<family>.py`. They run on CPU tensors with a driver that
claims a GPU and kernels that stop before the launch, so the compiled code is the one a user gets. Exits with 1 if a
kernel spills registers, needs more shared memory than the GPU has, or computes an address in 32 bits.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-aot-"))

import torch
import triton
from triton.backends.compiler import GPUTarget

import cacovid_kernels as ck
import cacovid_kernels.triton

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """A Triton driver that names a target and can launch nothing."""

    launcher_cls = None

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels remember what they compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[tuple[str, Any, float]]]:
    """Inside, a launch compiles for `arch` and runs nothing; yields (name, compiled kernel, seconds) of each."""
    compiled: list[tuple[str, Any, float]] = []
    seen: set[str] = set()
    run = triton.runtime.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled.append((self.fn.__name__, kernel, time.perf_counter() - start))
        return kernel

    driver = triton.runtime.driver
    serves = cacovid_kernels.triton.unavailable
    driver.set_active(AbsentGPU(arch))
    triton.runtime.JITFunction.run = compile_only
    cacovid_kernels.triton.unavailable = lambda device_type=None: ""
    try:
        with ck.use_backend("triton"):
            yield compiled
    finally:
        triton.runtime.JITFunction.run = run
        cacovid_kernels.triton.unavailable = serves
        driver.set_active(None)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, bytes of stack and local memory (spills) per thread, and shared memory per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {**found, "SHARED": kernel.metadata.shared}


# What an offset is made of; anything else (a load, an argument, a loop variable) ends the search.
PASSES_ON = ("splat", "expand_dims", "broadcast", "reshape", "addi", "subi", "muli", "select", "extsi", "extui")


def narrow_addresses(kernel: Any) -> list[str]:
    """Lines of the IR where a 32-bit product becomes part of an address: it overflows beyond 2^31 elements."""
    lines = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", kernel.asm["ttir"], re.M))

    def operands(text: str) -> list[str]:
        return re.findall(r"%[\w#]+", text.split(" : ")[0])

    def is_bounded(name: str) -> bool:
        """A constant, or the number of a lane."""
        text = lines.get(name, "")
        if re.match(r"tt\.(splat|expand_dims|broadcast)", text):
            return all(map(is_bounded, operands(text)))
        return text.startswith(("arith.constant", "tt.make_range"))

    def search(name: str, seen: set[str]) -> list[str]:
        text = lines.get(name, "")
        if name in seen or not text.startswith(tuple(f"{d}.{op}" for d in ("tt", "arith") for op in PASSES_ON)):
            return []
        seen.add(name)
        parts = operands(text)
        if text.startswith("arith.muli") and re.search(r": (tensor<[\dx]+x)?i32>?( loc|$)", text):
            return [] if all(map(is_bounded, parts)) else [f"{name} = {text}"]
        return [line for part in parts for line in search(part, seen)]

    found = [line for text in lines.values() if "tt.addptr" in text for line in search(operands(text)[1], set())]
    return sorted(set(found))


def compile_family(arch: int, family: str) -> int:
    """Prints a line per kernel of a family; returns how many fail."""
    failures = 0
    for specimen, call in importlib.import_module(f"specimens.{family}").calls():
        with compiling_for(arch) as compiled:
            call()
        for name, kernel, seconds in compiled:
            use, narrow = resources(kernel), narrow_addresses(kernel)
            spills = use["STACK"] + use["LOCAL"]
            bad = spills > 0 or use["SHARED"] > SHARED_LIMIT[arch] or bool(narrow)
            failures += bad
            print(
                f"{name:32}{arch:>10}{use['REG']:>10}{spills:>10}{use['SHARED']:>10}{len(narrow):>10}"
                f"{seconds:>10.2f}  {family}: {specimen}{'  <-- FAILS' if bad else ''}",
                flush=True,
            )
            for line in narrow:
                print(f"    32-bit address: {line}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", type=int, default=[80, 90, 100], help="compute capabilities times ten")
    parser.add_argument("--family", help="only the specimens of this family")
    parser.add_argument("--jobs", type=int, default=2, help="GPUs at a time")
    options = parser.parse_args()
    families = [options.family] if options.family else sorted(p.stem for p in (HERE / "specimens").glob("*.py"))
    if len(options.archs) == 1:
        sys.path.insert(0, str(HERE))
        return 1 if sum(compile_family(options.archs[0], family) for family in families) else 0

    def compile_apart(arch: int) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, str(arch), *(["--family", options.family] if options.family else [])]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True)

    columns = ["sm", "registers", "spills", "shared", "narrow", "seconds"]
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'kernel':32}" + "".join(f"{column:>10}" for column in columns) + "  specimen", flush=True)
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for run in pool.map(compile_apart, options.archs):
            print(run.stdout, end="", flush=True)
            failed |= run.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
