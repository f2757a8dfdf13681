"""Evidence on a GPU: builds, tests, races, checks for races and bad accesses, profiles. Needs no network.

    python bench/gpu.py [--part tests|bench|sanitize|profile|all] [--dry-run] [--results FILE] [--budget SECONDS]

Runs under the Python that has torch, triton, pybind11, cmake, ninja and pytest; creates no environment. Each part ends
within its budget and names what it had no time for. Results are appended line by line to bench/results/<gpu>.jsonl;
a part replaces its own earlier lines. `--dry-run` runs everything but the launches on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_processes import (
    begin,
    environment,
    find_tool,
    import_folders,
    native_sources,
    no_emulated_kernels,
    run,
    stop,
)

if TYPE_CHECKING:
    from gpu_device import Device
    from gpu_measure import Results

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "bench", "sanitize", "profile")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")


def build(dry: bool) -> None:
    """The native module, beside the sources as an editable installation has it, unless it is newer than they.

    With CUDA kernels for the GPU at hand, if nvcc is there. A dry run takes the module that is there: it must not
    change what other tests are just using.
    """
    module = ROOT / "cacovid_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists() and (dry or module.stat().st_mtime > max(path.stat().st_mtime for path in native_sources())):
        print(f"built already: {module.relative_to(ROOT)}")
        return
    start, work = time.monotonic(), ROOT / "build" / "gpu"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja", "-DCACOVID_PYTHON=ON", "-DCACOVID_TESTS=OFF",
        "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    import torch

    nvcc = find_tool("nvcc") if torch.cuda.is_available() else None
    if nvcc:
        capability = "{}{}".format(*torch.cuda.get_device_capability())
        configure += ["-DCACOVID_CUDA=1", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCACOVID_CUDA_ARCHITECTURES={capability}"]
    with contextlib.suppress(ImportError):  # else where CMake looks by itself
        import pybind11

        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command in (configure, ["cmake", "--build", str(work)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})
    kernels = f"with {nvcc}" if nvcc else "without CUDA kernels: there is no nvcc"
    print(f"built {module.relative_to(ROOT)} {kernels} in {time.monotonic() - start:.0f} s")


# ---- tests --------------------------------------------------------------------------------------


def pytest_command(*extra: str) -> list[str]:
    return [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-q", "--tb=short", *extra]


def tests(gpu: Device, results: Results, budget: float) -> bool:
    """All tests marked gpu: the large ones alone, the others in several processes, because compiling takes cores."""
    end = time.monotonic() + budget
    alone = ["test_large.py", "test_memory.py"]
    shards = gpu.pick(max(1, min(8, (os.cpu_count() or 2) // 2)), 1)
    scale = "dry" if gpu.dry else "full"
    folder = Path(tempfile.mkdtemp(prefix="cacovid-gpu-"))

    def start(name: str, seconds: float, shard: str, *extra: str) -> subprocess.Popen:
        env = environment(
            gpu.dry, CACOVID_GPU_SCALE=scale, CACOVID_GPU_SHARD=shard, CACOVID_GPU_SECONDS=str(seconds),
            CACOVID_GPU_RESULTS=str(results.path.resolve()), CACOVID_GPU_COMMON=json.dumps(results.common),
            OMP_NUM_THREADS="2",
        )  # fmt: skip
        log = (folder / f"{name}.log").open("w")
        return begin(pytest_command(*extra), env, log)

    def finish(processes: dict[str, subprocess.Popen], latest: float) -> list[str]:
        bad = []
        for name, process in processes.items():
            try:
                code = process.wait(timeout=max(1, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                stop(process)
                code = 1
                bad.append(f"{name}: stopped, it ran past the budget")
            if code not in (0, 1, 5):  # passed, failed, nothing collected
                bad.append(f"{name}: pytest ended with {code}\n" + (folder / f"{name}.log").read_text()[-3000:])
        return bad

    large = [str(ROOT / "tests" / "gpu" / name) for name in alone]
    ignored = [f"--ignore={path}" for path in large]
    first = 0.7 * budget
    processes = {f"shard{i}": start(f"shard{i}", first, f"{i}/{shards}", *ignored) for i in range(shards)}
    trouble = finish(processes, end - 0.2 * budget)
    others = [path for path in (ROOT / "tests" / "gpu").glob("test_*.py") if path.name not in alone]
    left = end - time.monotonic()
    trouble += finish({"alone": start("alone", left, "0/1", *(f"--ignore={path}" for path in others))}, end + 20)
    rows = [row for line in results.path.read_text().splitlines() if (row := json.loads(line))["part"] == "tests"]
    outcomes = Counter(row["outcome"] for row in rows)
    print(f"{dict(outcomes)}; {sum(row.get('cases', 0) for row in rows)} random cases compared")
    for row in rows:
        if row["outcome"] == "skipped":
            print(f"  skipped {row['test']}: {row['reason']}")
    for row in rows:
        if row["outcome"] == "failed":
            print(f"  FAILED {row['test']}\n{row['reason'][-700:]}")
    for text in trouble:
        print(f"  {text}")
    print(f"logs: {folder}")
    return not trouble and outcomes["failed"] == 0 and outcomes["passed"] > 0


# ---- bench --------------------------------------------------------------------------------------


def bench(gpu: Device, results: Results, budget: float) -> bool:
    """Every race that the budget has room for, then the aims."""
    import gpu_gates
    import gpu_measure
    import gpu_races
    import torch

    end = time.monotonic() + budget
    limits = gpu_measure.ceilings(gpu, results)
    skipped: list[str] = []
    for key, make in gpu_races.races(gpu):
        if time.monotonic() > end:
            skipped.append(key)
            continue
        start = time.monotonic()
        torch._dynamo.reset()
        try:
            skipped += gpu_measure.run(gpu, key, make(), limits, results, end)
        except Exception as error:  # one race that cannot be made stops no other
            print(traceback.format_exc(limit=-4))
            results.add(key=key, family="race", contestant="ours", error=f"{type(error).__name__}: {error}"[:500])
        gpu.cuda.empty_cache()
        print(f"{key}: {time.monotonic() - start:.1f} s")
    print(
        f"\n{'us of one call':30} {'contestant':32} {'graph':>9} {'cold':>9} {'eager':>9} {'bound':>9} {'launches':>8} "
        f"{'x ours':>8}"
    )
    for row in results.rows:
        if row["family"] != "ceilings":
            print(_line(row))
    text, verdicts = gpu_gates.table(results.rows, gpu.dry)
    for verdict in verdicts:
        results.add(**verdict)
    print(f"\n{text}")
    for name in skipped:
        print(f"skipped for lack of time: {name}")
        results.add(family="skipped", key=name)
    return not any("error" in row and row["contestant"].startswith("ours") for row in results.rows)


def _line(row: dict[str, Any]) -> str:
    us = row.get("us", {})
    shown = [
        f"{us[mode]:.2f}" if us.get(mode) is not None else "-" for mode in ("graph_warm", "graph_cold", "eager_warm")
    ]
    ratios = row.get("ratio_to_ours", {})
    ratio = ratios.get("graph_cold") or ratios.get("eager_cold")
    return (
        f"{row['key']:30} {row['contestant']:32} {shown[0]:>9} {shown[1]:>9} {shown[2]:>9} "
        f"{row.get('bound_us', 0):>9.2f} {row.get('launches', '-'):>8} "
        f"{f'{ratio:.2f}' if ratio else 'error' if 'error' in row else '-':>8}"
    )


# ---- sanitize -----------------------------------------------------------------------------------


def sanitize(gpu: Device, results: Results, budget: float) -> bool:
    """A few cases of every op under each of compute-sanitizer's tools, for each backend."""
    tool = find_tool("compute-sanitizer")
    if tool is None and not gpu.dry:
        print("compute-sanitizer is not on this machine: nothing was checked")
        results.add(family="sanitize", tool=None, verdict="not here")
        return True
    suite = pytest_command("-k", "test_usual_sizes or test_random_cases or test_bad_values", "-rs")
    # Every tensor an allocation of its own, so that reading past one is seen.
    env = environment(gpu.dry, CACOVID_GPU_SCALE="cut", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    good, end = True, time.monotonic() + budget
    turns = [(name, backend) for backend in BACKENDS for name in TOOLS[: gpu.pick(len(TOOLS), 1)]]
    for i, (name, backend) in enumerate(turns):
        env["CACOVID_GPU_BACKENDS"] = backend
        seconds = (end - time.monotonic()) / (len(turns) - i)
        if gpu.dry:  # without a GPU: does the suite exist
            command = [*suite, "--collect-only"]
        else:
            command = [str(tool), "--tool", name, "--error-exitcode", "86", "--print-limit", "5", *suite]
        start = time.monotonic()
        code, text = run(command, {**env, "CACOVID_GPU_SECONDS": str(0.8 * seconds)}, seconds)
        verdict = {0: gpu.pick("clean", "dry run"), 86: "ERRORS", None: "stopped at its time"}.get(
            code, f"ended with {code}"
        )
        good &= code == 0
        wanted = ("ERROR SUMMARY", "passed", "SKIPPED") if code == 0 else ("=====", "passed", "SKIPPED", "FAILED")
        tail = "\n".join([line for line in text.splitlines() if any(word in line for word in wanted)][-25:])
        seconds = time.monotonic() - start
        results.add(
            family="sanitize", tool=name, backend=backend, verdict=verdict, seconds=seconds, output=tail[-4000:]
        )  # fmt: skip
        print(f"{name:10} {backend:7} {verdict:20} {seconds:6.0f} s  {tail if code == 0 else text[-1500:]}")
    return good


def profile(gpu: Device, results: Results, budget: float) -> bool:
    """Bytes, occupancy and registers of the kernels of one call per race."""
    import gpu_profile

    return gpu_profile.profile(gpu, results, budget)


# ---- the script ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument(
        "--dry-run", action="store_true", help="everything but the launches, on a machine without a GPU"
    )
    parser.add_argument(
        "--results", type=Path, help="default: bench/results/<gpu>.jsonl, of a dry run a temporary file"
    )
    parser.add_argument("--budget", type=float, default=500, metavar="SECONDS", help="of each part")
    parser.add_argument("--one-call-each", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut shall have said what it did
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # triton decides at its first import
        if reason := no_emulated_kernels():
            print(f"no CUDA kernels: {reason}")
    sys.path[:0] = [*import_folders(options.dry_run), str(ROOT / "bench")]
    build(options.dry_run)

    from gpu_device import Device
    from gpu_measure import Results

    gpu = Device(options.dry_run)
    unusable = (
        "" if gpu.dry or gpu.cuda.is_available() else "torch sees no CUDA device. Pass --dry-run to try the script."
    )
    if unusable:
        print(unusable)
        return 2
    if options.one_call_each:
        from gpu_profile import one_call_each

        return 0 if one_call_each(gpu, options.budget) else 1
    info = gpu.info()
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    slug = info["gpu"].lower().replace(" ", "-")
    default = Path(tempfile.mkdtemp()) / "dry-run.jsonl" if gpu.dry else ROOT / "bench" / "results" / f"{slug}.jsonl"
    path = options.results or default
    verdicts = {}
    for part in PARTS if options.part == "all" else (options.part,):
        start = time.monotonic()
        print(f"\n== {part}")
        try:
            left = options.budget - (start - begun if part == options.part else 0)  # what building took
            good = globals()[part](gpu, Results(path, part, info), left)
        except Exception:
            print(traceback.format_exc())
            good = False
        verdicts[part] = f"{'ok' if good else 'FAILED'} in {time.monotonic() - start:.0f} s"
    print(f"\nresults: {path}")
    for part, verdict in verdicts.items():
        print(f"{part:10} {verdict}")
    return 0 if all(verdict.startswith("ok") for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
