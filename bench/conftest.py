"""The benchmark harness: every op runs beside its baselines, in one process, on one thread, on fresh inputs.

A repeated input trains the branch predictor (a top-k of 196 scores reads several times too fast) and a fresh output
pays page faults, so inputs rotate and contestants write to preallocated outputs where they can.
"""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cacovid_kernels

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", metavar="FILE", help="write medians and ratios as JSON lines to FILE")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def race(benchmark) -> Callable[..., None]:
    """`race(group, contestant, call, inputs, targets)`: times `call(*inputs[i])` over rotating inputs.

    `targets` (given with the contestant "ours") maps a baseline to the least ratio, baseline time / our time. A
    baseline of several groups may name them all.
    """

    def run(
        group: str | list[str],
        contestant: str,
        call: Callable,
        inputs: Sequence[tuple[Any, ...]],
        targets: dict[str, float] | None = None,
        seconds: float = 0.4,
    ) -> None:
        benchmark.extra_info["groups"] = groups = [group] if isinstance(group, str) else group
        benchmark.group = groups[0]
        benchmark.name = contestant
        benchmark.extra_info["targets"] = targets or {}
        turn = itertools.cycle(inputs)
        call(*next(turn))
        start = time.perf_counter()
        call(*next(turn))
        once = max(time.perf_counter() - start, 1e-6)
        rounds, warmup = (max(5, min(2000, int(seconds / once))), 3) if once < 1 else (3, 0)
        benchmark.pedantic(
            lambda args: call(*args), setup=lambda: ((next(turn),), {}), rounds=rounds, warmup_rounds=warmup
        )

    return run


RECORDED = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(group, ratios=..., shares=..., limits=...)`: a row of what is no race.

    `ratios` are a baseline's bytes or computed times over ours; `shares` are parts of a time, which `limits` bounds.
    """

    def run(group: str, **values: dict[str, float]) -> None:
        rows = request.config.stash.setdefault(RECORDED, [])
        rows.append({"group": group, "ratios": {}, "targets": {}, **values})

    return run


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _rows(benchmarks: list[Any]) -> list[dict[str, Any]]:
    """One row per group: our median and the ratio of every baseline's median to it."""
    groups: dict[str, dict[str, Any]] = {}
    for bench in benchmarks:
        if bench.stats.rounds:
            for group in bench.extra_info["groups"]:
                groups.setdefault(group, {})[bench.name] = bench
    rows = []
    for group, contestants in groups.items():
        ours = contestants.get("ours")
        if ours is None:
            continue
        medians = {name: bench.stats.median for name, bench in contestants.items()}
        ratios = {name: t / medians["ours"] for name, t in medians.items() if name != "ours"}
        rows.append({"group": group, "ratios": ratios, "targets": ours.extra_info["targets"]})
    return rows


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = (_rows(session.benchmarks) if session else []) + config.stash.get(RECORDED, [])
    if not rows:
        return
    terminalreporter.section("baseline time / our time, medians of this run")
    for row in rows:
        for baseline, ratio in row["ratios"].items():
            target = row["targets"].get(baseline)
            verdict = "" if target is None else f"  target {target:g}x {'reached' if ratio >= target else 'MISSED'}"
            terminalreporter.write_line(f"{row['group']:<44} {baseline:<28} {ratio:8.2f}x{verdict}")
        for part, share in row.get("shares", {}).items():
            limit = row["limits"][part]
            verdict = f"  limit {limit:.0%} {'kept' if share < limit else 'MISSED'}"
            terminalreporter.write_line(f"{row['group']:<44} {part:<28} {100 * share:8.2g}%{verdict}")
    if path := config.getoption("--save-results"):
        header = {
            "commit": _commit(),
            "machine": platform.machine(),
            "cpu_isa": getattr(cacovid_kernels.native._C, "cpu_isa", None),
            "torch": torch.__version__,
            "threads": 1,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
        terminalreporter.write_line(f"wrote {path}")
