"""Where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stages:
    """Seconds per named stage: by the clock on a CPU, by events of the stream on a GPU, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._pending.append((name, start, self._mark()))

    def collect(self) -> None:
        """Add up what has been marked. Call it where the stream has been waited for anyway."""
        for name, start, end in self._pending:
            seconds = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._pending.clear()

    def shares(self) -> str:
        """One line: percent of the time in each stage."""
        total = sum(self.seconds.values()) or 1.0
        ordered = sorted(self.seconds.items(), key=lambda x: -x[1])
        return ", ".join(f"{name} {100 * seconds / total:.0f}%" for name, seconds in ordered)

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
