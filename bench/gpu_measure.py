"""How a race on a GPU is run: every contestant's answer is checked, then timed four ways, then counted."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_device import Device, tensors_of
from torch import Tensor

import cacovid_kernels as ck

BACKENDS = ("cuda", "triton")
MODES = ("graph_warm", "graph_cold", "eager_warm", "eager_cold")


@dataclass
class Race:
    """One op at one shape, and who else can do it.

    Attributes:
        contestants: calls by name; "ours" first, which enters once for each GPU backend that has its kernels. Every
            call gets the same arguments.
        inputs: argument tuples to rotate over.
        check: `check(our result, another's result)` raises if they differ; may return the share of other indices.
        bytes: fewest that have to move, read and written.
        operations: multiplications and additions, where they matter.
        rotates: whether the inputs together exceed the L2 cache, so that rotating makes them cold. Else the cache
            is flushed before each cold call.
        answers: calls that stand in for a contestant's while its result is checked, where it destroys its input.
    """

    family: str
    shape: str
    contestants: dict[str, Callable[..., Any]]
    inputs: Sequence[tuple]
    check: Callable[[Any, Any], float | None]
    bytes: int
    operations: int = 0
    rotates: bool = False
    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)


class Results:
    """A file of JSON lines that is complete up to the moment a run is cut."""

    def __init__(self, path: Path, part: str, info: dict[str, Any]) -> None:
        self.path, self.common, self.rows = path, {"part": part, **info}, []
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in old if json.loads(line)["part"] != part))

    def add(self, **row: Any) -> dict[str, Any]:
        self.rows.append({**row, **self.common})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        return self.rows[-1]


@dataclass
class Ceilings:
    """What this GPU does at best, measured in the same process."""

    copy: float  # bytes per us, read and written
    matmul: float  # operations per us
    floor: float  # us of an empty kernel in a graph

    def bound(self, race: Race) -> float:
        return max(race.bytes / self.copy, race.operations / self.matmul, self.floor)


def ceilings(gpu: Device, results: Results) -> Ceilings:
    n = gpu.pick(2**30, 2**12)
    x, y = (torch.ones(n, dtype=torch.uint8, device=gpu.device) for _ in range(2))
    copy = gpu.microseconds(lambda: y.copy_(x), gpu.pick(30, 2))
    size = gpu.pick(8192, 32)
    a, b = (torch.randn(size, size, device=gpu.device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    matmul = gpu.microseconds(lambda: a @ b, gpu.pick(20, 2))
    one = torch.zeros(1, device=gpu.device)
    times = 20
    captured = gpu.capture(lambda: [one.add_(1) for _ in range(times)])
    floor = gpu.microseconds(captured.replay, gpu.pick(100, 2)) / times
    captured = gpu.capture(lambda: one.add_(1))
    alone = gpu.microseconds(captured.replay, gpu.pick(100, 2), before=gpu.flush)
    found = Ceilings(2 * n / copy, 2 * size**3 / matmul, floor)
    results.add(
        family="ceilings", copy_GBps=found.copy / 1e3, matmul_TFLOPs=found.matmul / 1e6, floor_us=floor,
        floor_of_a_graph_of_one_us=alone,
    )  # fmt: skip
    print(
        f"copy {found.copy / 1e3:.0f} GB/s, bf16 products {found.matmul / 1e6:.0f} TFLOP/s, empty kernel "
        f"{floor:.2f} us in a graph of {times}, {alone:.2f} us in a graph of its own after a flush"
    )
    return found


def _repeat(call: Callable[..., Any], inputs: Sequence[tuple]) -> Callable[[], None]:
    def run() -> None:
        for args in inputs:
            call(*args)

    return run


def times(gpu: Device, race: Race, call: Callable[..., Any], capturable: bool) -> dict[str, float | None]:
    """Median microseconds of one call, for every mode."""
    first = race.inputs[0]
    once = max(gpu.microseconds(lambda: call(*first), gpu.pick(3, 1)), 1.0)
    rounds = gpu.pick(max(3, min(100, int(2e5 / once))), 1)
    count = gpu.pick(max(1, min(20, int(2e3 / once))), 1)
    before, cold_inputs = (None, race.inputs) if race.rotates else (gpu.flush, [first])
    modes = {
        "warm": (_repeat(call, [first] * count), count, max(3, rounds // count), None),
        "cold": (_repeat(call, cold_inputs), len(cold_inputs), max(3, rounds // len(cold_inputs)), before),
    }
    found: dict[str, float | None] = dict.fromkeys(MODES)
    for mode, (calls, number, repeats, preparation) in modes.items():
        repeats = gpu.pick(repeats, 1)
        found[f"eager_{mode}"] = gpu.microseconds(calls, repeats, preparation) / number
        if capturable:
            replay = gpu.capture(calls).replay
            replay()
            found[f"graph_{mode}"] = gpu.microseconds(replay, repeats, preparation) / number
            del replay  # and with it the graph's memory
    return found


def ours(backend: str) -> str:
    """The name under which our op competes."""
    return f"ours, {backend}"


def serving(name: str) -> AbstractContextManager:
    """Inside, the backend of that name's contestant serves; others take no notice."""
    return ck.use_backend(name.removeprefix("ours, ")) if name.startswith("ours, ") else nullcontext()


def entered(race: Race) -> dict[str, Callable[..., Any]]:
    """All contestants, ours once per backend that has the kernels."""
    found: dict[str, Callable[..., Any]] = {}
    for backend in BACKENDS:
        try:
            with serving(ours(backend)):
                race.answers.get("ours", race.contestants["ours"])(*race.inputs[0])
        except RuntimeError as error:
            if "has no kernel for" in str(error) or "cannot serve" in str(error):
                print(f"  {race.family} {race.shape}: {error}")
                continue
        found[ours(backend)] = race.contestants["ours"]
    return found | {name: call for name, call in race.contestants.items() if name != "ours"}


def _check(
    race: Race, contestants: dict[str, Callable[..., Any]], end: float
) -> tuple[dict[str, str], dict[str, float]]:
    """Calls every contestant once and compares: what was wrong with some, and which share of the indices differs.

    All before anything is timed: timing may destroy the inputs.
    """
    wrong: dict[str, str] = {}
    differing: dict[str, float] = {}
    reference = None
    for name, call in contestants.items():
        if time.monotonic() > end:
            break
        mine = name.startswith("ours")
        try:
            with serving(name):
                answer = race.answers.get("ours" if mine else name, call)(*race.inputs[0])
            if mine and reference is None:
                reference = [x.clone() for x in tensors_of(answer)]
            elif reference is None:
                raise ValueError("ours failed, so there is nothing to compare with")
            else:
                check = equal if mine and race.family != "score" else race.check
                share = check(reference, list(tensors_of(answer)))
                differing.update({} if share is None else {name: share})
            for x in tensors_of(answer):  # a preallocated result must not pass for the next contestant's
                x.detach().zero_()
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:500]
    return wrong, differing


def run(gpu: Device, key: str, race: Race, limits: Ceilings, results: Results, end: float) -> list[str]:
    """Runs one race and writes a row for every contestant; returns what there was no time for."""
    skipped = []
    contestants = entered(race)
    wrong, differing = _check(race, contestants, end)
    first: dict[str, Any] = {}  # of ours: the others are compared with it
    for name, call in contestants.items():
        if time.monotonic() > end:
            skipped.append(f"{key}: {name}")
            continue
        row: dict[str, Any] = {"key": key, "family": race.family, "shape": race.shape, "contestant": name}
        try:
            if name in wrong:
                raise ValueError(wrong[name])
            with serving(name):
                row["launches"] = gpu.launches(lambda call=call: call(*race.inputs[0]))
                row["synchronisations"] = gpu.synchronisations(lambda call=call: call(*race.inputs[0]))
                capturable = row["synchronisations"] == 0
                try:
                    row["us"] = times(gpu, race, call, capturable)
                except RuntimeError as error:
                    if not capturable:
                        raise
                    row["not_captured"] = f"{error}"[:300]
                    row["us"] = times(gpu, race, call, capturable=False)
        except Exception as error:
            row["error"] = wrong.get(name, f"{type(error).__name__}: {error}"[:500])
            print(f"  {key}: {name}: {row['error']}")
        if "us" in row:
            first = first or (row["us"] if name.startswith("ours") else {})
            row["ratio_to_ours"] = {
                mode: t / first[mode] for mode, t in row["us"].items() if t is not None and first.get(mode)
            }
            bound, cold = limits.bound(race), row["us"]["graph_cold"] or row["us"]["eager_cold"]
            row.update(bytes=race.bytes, operations=race.operations, bound_us=bound, fraction_of_bound=bound / cold)
            row["differing_share"] = differing.get(name, 0.0)
            row["cold_by"] = "rotation" if race.rotates else "flush"
        results.add(**row)
    return skipped


# ---- checks -------------------------------------------------------------------------------------


def equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The same bits, whatever the shape."""
    for x, y in itertools.zip_longest(ours, theirs):
        if x.numel() != y.numel() or not torch.equal(x.reshape(-1), y.reshape(-1)):
            raise ValueError("another result than ours")


def nearly_the_same_set(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The share of other indices than ours: a softmax merges close scores, float32 rounds a budget or a fill otherwise.

    One token more for one frame moves the fill of all frames between it and the one that has one less, so half of the
    tokens may differ before it is another selection.
    """
    mine, others = set(ours[0].tolist()), set(theirs[0].tolist())
    if len(mine) != len(others) or len(mine & others) < len(mine) / 2:
        raise ValueError(f"{len(mine ^ others)} other indices than ours, of {len(mine)}")
    return 1 - len(mine & others) / len(mine)


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 0.1) -> None:
    for x, y in itertools.zip_longest(ours, theirs):
        torch.testing.assert_close(y.float().reshape(-1), x.float().reshape(-1), rtol=tolerance, atol=tolerance)


def same_size(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Random draws, or only a part of the work: nothing else can be compared."""
    if not theirs or theirs[0].numel() == 0:
        raise ValueError("no result")
