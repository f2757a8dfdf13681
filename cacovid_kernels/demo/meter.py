"""Time and peak memory of each stage."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20


class Cost(NamedTuple):
    """What one stage took."""

    ms: float
    peak_mib: float | None  # most memory above that held at the start; None where it cannot be measured


class Meter:
    """Measures one stage at a time.

    On CUDA the peak is that of torch's allocator. On a CPU it is the kernel's high-water mark of resident
    memory (`VmHWM`), reset before the stage, with freed memory handed back first; Linux only. Both count what
    the stage needs on top of the weights and of what earlier stages left. Of a stage that ran more than once
    the shortest time and the highest peak are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[tuple[str, str], Cost] = {}
        self._base: float | None = None
        self._start = 0.0

    @property
    def method(self) -> str:
        if self.device.type == "cuda":
            return "torch.cuda.max_memory_allocated above the stage's start"
        return "resident memory (VmHWM) above the stage's start"

    @contextmanager
    def stage(self, run: str, name: str) -> Iterator[None]:
        self.begin()
        yield
        self.end(run, name)

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            self._base = _reset_high_water_mark()
        self._start = time.perf_counter()

    def end(self, run: str, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ms = (time.perf_counter() - self._start) * 1e3
        peak = self._peak()
        grown = None if peak is None or self._base is None else max(0.0, peak - self._base) / MIB
        before = self.costs.get((run, name), Cost(ms, grown))
        peak_mib = None if grown is None else max(grown, before.peak_mib or 0.0)
        self.costs[run, name] = Cost(min(ms, before.ms), peak_mib)

    def _peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM")


def _status_bytes(field: str) -> float | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1]) * 1024
    return None


def _reset_high_water_mark() -> float | None:
    """Resident bytes now, with the mark reset to them; None where the kernel does not offer it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else pages the allocator keeps would hide what the stage needs
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")
