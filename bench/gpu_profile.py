"""Bytes, occupancy and registers of every kernel, from ncu; its time alone where that is missing."""

from __future__ import annotations

import csv
import io
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_processes import environment, find_tool, run

if TYPE_CHECKING:
    from gpu_device import Device
    from gpu_measure import Results

METRICS = {
    "us": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "possible_occupancy_percent": "sm__maximum_warps_per_active_cycle_pct",
}


def each_race(gpu: Device, seconds: float, action: Callable[[str, Callable[[], Any]], None]) -> bool:
    """`action(key, our call)` for the first races, each of another shape; one that fails stops no other."""
    import gpu_measure
    import gpu_races

    good, end, seen = True, time.monotonic() + seconds, set()
    for key, make in gpu_races.races(gpu):
        if time.monotonic() > end or len(seen) == 16:
            print(f"skipped: {key}")
            continue
        try:
            race = make()
            seen.add(race.shape)
            for name, call in gpu_measure.entered(race).items():
                if name.startswith("ours"):
                    with gpu_measure.serving(name):
                        action(f"{key}, {name}", lambda call=call, race=race: call(*race.inputs[0]))
        except Exception:
            print(f"{key} failed:\n{traceback.format_exc(limit=-4)}")
            good = False
        gpu.cuda.empty_cache()
    return good


def profile(gpu: Device, results: Results, budget: float) -> bool:
    """Bytes, occupancy and registers of the kernels of one call per race, from ncu; times alone where it is missing."""
    tool = find_tool("ncu")
    if tool is not None and not gpu.dry:
        command = [
            tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
            "--print-units", "base", "--metrics", ",".join(METRICS.values()),
            sys.executable, str(Path(__file__).resolve().with_name("gpu.py")), "--one-call-each",
            "--budget", str(0.6 * budget),
        ]  # fmt: skip
        code, text = run(command, environment(False), 0.8 * budget)
        rows = list(read_ncu(text))
        for row in rows:
            results.add(family="profile", **row)
        if rows:
            _print_profile(rows)
            return code == 0
        print(f"ncu gave no table (it ended with {code}), so torch.profiler's times instead: {text[-1500:]}")
    else:
        print("ncu is not on this machine, so torch.profiler's times instead")
    if gpu.dry and not one_call_each(gpu, budget):
        return False
    return each_race(gpu, budget / 5, lambda key, call: _profile_with_torch(gpu, results, key, call))


def _profile_with_torch(gpu: Device, results: Results, key: str, call: Callable[[], Any]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    call()
    gpu.synchronize()
    activities = [ProfilerActivity.CPU] if gpu.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch_profile(activities=activities) as recorded:
        call()
        gpu.synchronize()
    kernels = [(event.key[:80], event.self_device_time_total, event.count) for event in recorded.key_averages()]
    for kernel, us, calls in sorted(kernels, key=lambda found: -found[1])[:5]:
        if us > 0 or gpu.dry:
            row = results.add(family="profile", key=key, kernel=kernel, us=us, calls=calls)
            print(f"{key:34} {row['kernel'][:60]:60} {us:9.2f} us {calls:4}")


def one_call_each(gpu: Device, seconds: float) -> bool:
    """What ncu watches: one warm call per race is in the profiled range."""

    def watched(key: str, call: Callable[[], Any]) -> None:
        call()
        gpu.synchronize()
        gpu.cuda.profiler.start()
        call()
        gpu.synchronize()
        gpu.cuda.profiler.stop()

    return each_race(gpu, seconds, watched)


def read_ncu(text: str) -> Iterator[dict[str, Any]]:
    """Rows of `ncu --csv --page raw`, whose header starts with "ID" and is followed by a line of units.

    ncu prints kernels after the program's own output, in the order of their launches.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    table = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    for row in table[1:]:
        found: dict[str, Any] = {"kernel": row.get("Kernel Name", "")[:80]}
        for name, metric in METRICS.items():
            try:
                found[name] = float((row.get(metric) or "").replace(",", ""))
            except ValueError:
                found[name] = None
        if found["us"] is not None:
            found["us"] /= 1000  # base units: nanoseconds
        yield found


def _print_profile(rows: list[dict[str, Any]]) -> None:
    print(f"{'kernel':44} {'us':>8} {'MB':>8} {'dram %':>7} {'regs':>5} {'occ %':>6} {'of %':>6} {'blocks':>8}")
    for row in rows:
        values = {name: row[name] if row[name] is not None else float("nan") for name in METRICS}
        moved = (values["bytes_read"] + values["bytes_written"]) / 1e6
        print(
            f"{row['kernel'][:44]:44} {values['us']:8.2f} {moved:8.2f} {values['dram_percent']:7.1f} "
            f"{values['registers']:5.0f} {values['occupancy_percent']:6.1f} "
            f"{values['possible_occupancy_percent']:6.1f} {values['blocks']:8.0f}"
        )
