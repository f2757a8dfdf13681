"""`make gpu` runs all of its lines on a machine without a GPU, so that the first minute on one goes to measuring."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
from gpu_processes import no_emulated_kernels  # noqa: E402

PARTS = ("tests", "bench", "sanitize", "profile")
NO_CUDA = no_emulated_kernels()
BACKENDS = ["triton"] if NO_CUDA else ["triton", "cuda"]
environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every part, all at once: (process, results)."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--results"]
    found = {}
    for part in PARTS:
        results = folder / f"{part}.jsonl"
        with (folder / f"{part}.log").open("w") as log:
            arguments = [*command, str(results), "--part", part]
            process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        found[part] = process, results, Path(log.name)
    yield found
    for process, _, _ in found.values():
        if process.poll() is None:
            process.kill()
            process.wait()


def rows_of(runs, part):
    process, results, log = runs[part]
    assert process.wait(timeout=600) == 0, log.read_text()[-4000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["part"] for row in rows} == {part}
    assert all(row.keys() >= {"commit", "date", "gpu", "driver", "torch", "triton"} for row in rows)
    return rows


def test_tests(runs):
    rows = rows_of(runs, "tests")
    assert {row["outcome"] for row in rows} <= {"passed", "skipped"}
    files = {row["test"].split("::")[0] for row in rows}
    assert files == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert sum(row.get("cases", 0) for row in rows) > 0


def test_bench(runs):
    rows = rows_of(runs, "bench")
    assert not [row for row in rows if "error" in row or "not_captured" in row]
    assert {row["family"] for row in rows} >= {
        "ceilings",
        "select",
        "combinations",
        "gather",
        "repack",
        "paged",
        "score",
        "attention_scores",
        "policy_loss",
        "generate",
        "gate",
    }
    ours = [row for row in rows if row.get("contestant", "").startswith("ours")]
    assert {row["contestant"] for row in ours} == {f"ours, {backend}" for backend in BACKENDS}
    for row in ours:
        assert row["us"].keys() == {"graph_warm", "graph_cold", "eager_warm", "eager_cold"}
        assert row["fraction_of_bound"] > 0
    assert {row["verdict"] for row in rows if row["family"] == "gate"} <= {"dry run", "not measured"}


@pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA)
def test_cuda_kernels_took_part(runs):
    contestants = {row.get("contestant") for row in rows_of(runs, "bench")}
    assert "ours, cuda" in contestants


def test_sanitize_and_profile(runs):
    assert [(row["tool"], row["backend"]) for row in rows_of(runs, "sanitize")] == [
        ("memcheck", "cuda"), ("memcheck", "triton"),
    ]  # fmt: skip
    profiled = rows_of(runs, "profile")
    assert {row["key"].rpartition("ours, ")[2] for row in profiled} == set(BACKENDS)


def test_the_stand_in_has_names_that_torch_has():
    """Each name of the stand-in is one of torch.cuda's, and whoever calls it that way can call torch's so."""
    from gpu_device import _StandIn

    def compare(mine, theirs, where):
        for name in [name for name in dir(mine) if not name.startswith("_")]:
            assert hasattr(theirs, name), f"{where}.{name}"
            pair = getattr(mine, name), getattr(theirs, name)
            if inspect.isclass(pair[0]) or inspect.ismodule(pair[1]):
                if name != "CUDAGraph":  # defined in C++, absent from a build without CUDA
                    compare(*pair, f"{where}.{name}")
            elif inspect.isfunction(pair[0]) and inspect.isfunction(pair[1]):
                parameters = [name for name in inspect.signature(pair[0]).parameters if name != "self"]
                assert (
                    parameters == [p for p in inspect.signature(pair[1]).parameters if p != "self"][: len(parameters)]
                )

    compare(_StandIn, torch.cuda, "torch.cuda")


def test_ncu_tables_are_read():
    from gpu_profile import METRICS, read_ncu

    names = ["ID", "Kernel Name", *METRICS.values()]
    lines = ["== select T=32", "==PROF== Connected", names, ["", "", *["unit"] * len(METRICS)]]
    lines += [["0", "select_kernel", "2,500", *["1.5"] * (len(names) - 3)], ["1", "other", *["n/a"] * (len(names) - 2)]]
    text = "\n".join(line if isinstance(line, str) else ",".join(f'"{cell}"' for cell in line) for line in lines)
    first, second = read_ncu(text)
    assert first["kernel"] == "select_kernel"
    assert first["us"] == 2.5
    assert first["registers"] == 1.5
    assert second["us"] is None
    assert list(read_ncu("ncu could not start")) == []


def test_aims_are_judged():
    from gpu_gates import GATES, table

    us = {"graph_warm": 5.0, "graph_cold": 8.0, "eager_warm": 40.0, "eager_cold": 50.0}
    slower = {mode: 35 * t for mode, t in us.items()}
    common = {
        "key": "select T=32",
        "launches": 1,
        "synchronisations": 0,
        "bytes": 1,
        "operations": 0,
        "cold_by": "flush",
        "bound_us": 2.5,
    }
    rows = [
        {"family": "ceilings", "copy_GBps": 4300, "matmul_TFLOPs": 790},
        {**common, "contestant": "ours, cuda", "us": us},
        {**common, "contestant": "ours, triton", "us": us},
        {**common, "key": "paged 10%", "contestant": "ours, cuda", "us": us},
        {**common, "key": "repack 10% in place", "contestant": "ours, cuda", "us": slower},
        {**common, "contestant": "vectorised torch", "us": slower},
        {**common, "contestant": "torch.compile of it", "us": us},
    ]
    text, found = table(rows, dry=False)
    verdicts = {(row["backend"], row["key"], row["what"]): row["verdict"] for row in found}
    assert verdicts["triton", "select T=32", "us"] == verdicts["cuda", "select T=32", "us"] == "reached"
    assert verdicts["triton", "select T=32", "vectorised torch"] == "reached"
    assert verdicts["triton", "select T=32", "torch.compile of it"] == "MISSED"
    assert verdicts["cuda", "paged 10%", "x repack 10% in place"] == "reached"
    assert verdicts["cuda", "combinations T=32", "us"] == verdicts["triton", "head", "of matmul"] == "not measured"
    assert len(verdicts) == sum(map(len, GATES.values()))
    assert "bound 2.50" in next(line for line in text.splitlines() if line.startswith("cuda, select T=32: us"))
