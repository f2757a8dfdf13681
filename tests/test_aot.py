"""The ahead-of-time checks see what they look for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """
import aot, torch, triton, triton.language as tl
from cacovid_kernels.triton.launch import launch

@triton.jit(do_not_specialize=["width"])
def narrow_row(x, width, BLOCK: tl.constexpr):
    tl.store(x + tl.program_id(0) * width + tl.arange(0, BLOCK), 1.0)

@triton.jit(do_not_specialize=["width"])
def widened_late(x, width, BLOCK: tl.constexpr):
    tl.store(x + (tl.program_id(0) * width).to(tl.int64) + tl.arange(0, BLOCK), 1.0)

@triton.jit(do_not_specialize=["width"])
def wide(x, width, BLOCK: tl.constexpr):
    tl.store(x + tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK) * 2, 1.0)

@triton.jit
def hungry(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.sort(tl.load(x + i)))

with aot.compiling_for(90) as compiled:
    for kernel in (narrow_row, widened_late, wide):
        launch(kernel, (2,), torch.zeros(16), 77, BLOCK=64)
    launch(hungry, (1,), torch.zeros(256, dtype=torch.int64), BLOCK=256, num_warps=1, maxnreg=24)
for name, kernel, _ in compiled:
    use = aot.resources(kernel)
    print(name, len(aot.narrow_addresses(kernel)), use["STACK"] + use["LOCAL"] > 0)
"""


def test_narrow_addresses_and_spills_are_seen(tmp_path):
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS)
    folder = Path(__file__).parent / "triton"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{folder.parents[1]}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:4] == [
        "narrow_row 1 False",
        "widened_late 1 False",
        "wide 0 False",
        "hungry 0 True",
    ]
