"""Tests that need a GPU. `make gpu PART=tests` runs them; `pytest tests` leaves them out.

Every test runs once per GPU backend; what a backend has no kernel for is skipped and says so.

The environment says how: CACOVID_GPU_BACKENDS is "cuda,triton" or one of them; CACOVID_GPU_SCALE is "full", "cut" (few
cases, for slow checkers) or "dry" (on the CPU, in Triton's interpreter and with emulated CUDA kernels: every line runs,
at sizes where values can still be compared); CACOVID_GPU_SHARD "2/8" takes every eighth test; CACOVID_GPU_SECONDS skips
what would begin later; CACOVID_GPU_RESULTS gets a line per test, with what CACOVID_GPU_COMMON says.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_device import Device  # noqa: E402

import cacovid_kernels as ck  # noqa: E402
from cacovid_kernels import cuda, triton  # noqa: E402

from .problems import SCALE  # noqa: E402

BACKENDS = os.environ.get("CACOVID_GPU_BACKENDS", "cuda,triton").split(",")
END = time.monotonic() + float(os.environ.get("CACOVID_GPU_SECONDS", "inf"))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker("gpu")
    number, shards = (int(n) for n in os.environ.get("CACOVID_GPU_SHARD", "0/1").split("/"))
    left_out = [item for i, item in enumerate(mine) if i % shards != number]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SCALE != "dry" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if time.monotonic() > END:
        pytest.skip("the time budget is used up")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    try:
        return (yield)
    except Exception as error:  # torch.compile wraps what the backend raised
        absent = re.search(r"backend '\w+' has no kernel for \w+", str(error))
        if absent is None:
            raise
        return pytest.skip(absent[0])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("CACOVID_GPU_RESULTS")
    if not path or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "seconds": round(report.duration, 3)}
    row.update(report.user_properties)
    row.update(json.loads(os.environ.get("CACOVID_GPU_COMMON", "{}")))
    if report.failed:
        row["reason"] = report.longreprtext[-2000:]
    elif report.skipped:
        row["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def gpu() -> Device:
    return Device(dry=SCALE == "dry")


@pytest.fixture(scope="session")
def small() -> bool:
    """Whether sizes have to suit an interpreter or a checker."""
    return SCALE != "full"


@pytest.fixture
def repeats():
    """`repeats(1000)`: how often to do what a GPU shall do so often."""
    return lambda full: {"full": full, "cut": min(full, 5), "dry": 1}[SCALE]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """The name of the backend that serves the test."""
    needed = "cpu" if SCALE == "dry" else "cuda"
    if reason := {"cuda": cuda, "triton": triton}[request.param].unavailable(needed):
        pytest.skip(f"{request.param}: {reason}")
    # An op that raises inside a compiled function leaves torch's gradients switched off: not for the next test.
    with torch.enable_grad(), ck.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Outputs start as garbage here too, on whatever device, so that an unwritten element fails a test."""
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        if isinstance(out, torch._subclasses.FakeTensor):
            return out
        return out.fill_(float("nan") if out.dtype.is_floating_point else 1 if out.dtype == torch.bool else 77)

    monkeypatch.setattr(torch, "empty", empty)
