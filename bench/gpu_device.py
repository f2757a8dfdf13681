"""The GPU that tests and benchmarks run on, or a stand-in that runs the same lines on the CPU and measures nothing.

`Device` speaks to `torch.cuda` alone. With `dry=True` a stand-in takes the place of that module, so that everything
but the launch itself runs on a machine without a GPU: kernels then run in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).parents[1]
NOT_LAUNCHES = {"Activity Buffer Request", "Buffer Flush", "Lazy Function Loading", "Command Buffer Full"}


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_of(branch)
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from tensors_of(branch)


class Captured:
    """A CUDA graph and the tensors that every replay writes."""

    def __init__(self, graph: Any, out: Any) -> None:
        self.graph, self.out = graph, out

    def replay(self) -> None:
        self.graph.replay()


class Device:
    """One GPU: timing, capture, counting. `dry` replaces it by the CPU."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.cuda: Any = _StandIn() if dry else torch.cuda
        self.device = torch.device("cpu" if dry else "cuda")
        self._cold: Tensor | None = None

    def pick(self, full: Any, dry: Any) -> Any:
        """A size or count: what the GPU gets, or what is enough to run every line."""
        return dry if self.dry else full

    def info(self) -> dict[str, Any]:
        """What a measurement is worth nothing without."""
        import triton  # not above: these tests are collected where there is none

        return {
            "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gpu": self.cuda.get_device_name(0),
            "driver": driver(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    @property
    def l2_bytes(self) -> int:
        return self.cuda.get_device_properties(0).L2_cache_size

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def compile(self, call: Callable, mode: str | None = "max-autotune-no-cudagraphs", **options: Any) -> Callable:
        """torch.compile; without a GPU only its tracing."""
        backend = {"backend": "eager"} if self.dry else {"mode": mode}
        return torch.compile(call, **backend, **options)

    # ---- capture and time ---------------------------------------------------------------------

    def capture(self, call: Callable[[], Any]) -> Captured:
        """A graph of one call, warmed up on a side stream: compilation and workspaces are no part of it."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            call()
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            out = call()
        if self.dry:
            graph.again = lambda: [a.copy_(b) for a, b in zip(tensors_of(out), tensors_of(call()), strict=True)]
        self.synchronize()
        return Captured(graph, out)

    def flush(self) -> None:
        """Pushes everything else out of the L2 cache. Reads, because written lines would be written back later."""
        if self._cold is None:
            self._cold = torch.zeros(self.pick(2**26, 2**10), dtype=torch.int32, device=self.device)
        self._cold.amax()

    def microseconds(self, run: Callable[[], Any], rounds: int, before: Callable[[], None] | None = None) -> float:
        """Median time of `run` between two events on the stream; `before` runs outside of them."""
        pairs = [(self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in pairs:
            if before is not None:
                before()
            start.record()
            run()
            end.record()
        self.synchronize()
        return statistics.median(1000 * start.elapsed_time(end) for start, end in pairs)

    # ---- count --------------------------------------------------------------------------------

    def launches(self, call: Callable[[], Any]) -> int:
        """Kernels, copies and fills that one call puts on the GPU."""
        call()
        self.synchronize()
        activities = [ProfilerActivity.CPU] if self.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.synchronize()
        return sum(
            event.device_type == DeviceType.CUDA
            and event.name not in NOT_LAUNCHES
            and not getattr(event, "is_user_annotation", False)
            for event in profile.events()
        )

    def synchronisations(self, call: Callable[[], Any]) -> int:
        """How often torch made the host wait during one call."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            self.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                self.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """Makes every wait of the host an error."""
        self.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def out_of_memory(self, spare: int) -> Iterator[None]:
        """Inside, no more than about `spare` bytes can be allocated."""
        self.cuda.empty_cache()
        total = self.cuda.get_device_properties(0).total_memory
        self.cuda.set_per_process_memory_fraction((self.cuda.memory_reserved() + spare) / total)
        try:
            yield
        finally:
            self.cuda.set_per_process_memory_fraction(1.0)


def commit() -> str:
    """The commit of the checkout, or of the environment where the checkout came without its history."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return os.environ.get("CACOVID_COMMIT") or found or "unknown"


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


# ---- the stand-in -------------------------------------------------------------------------------


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: _Event) -> float:
        return 1000 * (end_event.at - self.at)


class _Stream:
    def wait_stream(self, stream: _Stream) -> None:
        pass


class _Graph:
    def __init__(self) -> None:
        self.again: Callable[[], Any] = lambda: None

    def replay(self) -> None:
        self.again()


class _Properties:
    L2_cache_size = 1 << 20
    total_memory = 1 << 30


class _Profiler:
    @staticmethod
    def start() -> None:
        pass

    @staticmethod
    def stop() -> None:
        pass


class _StandIn:
    """What `Device` and the tests use of `torch.cuda`, with the same names and arguments, on the CPU."""

    Event, Stream, CUDAGraph, profiler = _Event, _Stream, _Graph, _Profiler
    _allocators = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full")

    def __init__(self) -> None:
        self._real: dict[str, Any] = {}

    def get_device_name(self, device: Any = None) -> str:
        return "no GPU"

    def get_device_properties(self, device: Any = None) -> _Properties:
        return _Properties()

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def graph(self, cuda_graph: _Graph) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def set_sync_debug_mode(self, debug_mode: str) -> None:
        if debug_mode not in ("default", "warn", "error"):
            raise ValueError(debug_mode)

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        """Less than all: every new tensor is too much."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("stand-in")

        if fraction < 1.0:
            self._real = {name: getattr(torch, name) for name in self._allocators}
            self._real["new_empty"] = Tensor.new_empty
        for name, real in self._real.items():
            owner = Tensor if name == "new_empty" else torch
            setattr(owner, name, refuse if fraction < 1.0 else real)
