"""What several test modules share."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"


def golden(folder: str) -> list:
    """All vectors of a golden folder, as pytest parameters named by file."""
    files = sorted((DATA / folder).glob("*.npz"))
    assert files, f"no golden files in {DATA / folder}"
    return [pytest.param(dict(np.load(f)), id=f.stem) for f in files]


def check_every_instruction_set(script: str) -> None:
    """A script that prints the instruction set in use and a digest of its results prints the same digest for all."""
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        env = {**os.environ, "CACOVID_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        name, digest = run.stdout.split()
        found[name] = digest
    assert "baseline" in found
    assert len(set(found.values())) == 1, found


def check_fork(call: Callable[[], int]) -> None:
    """After the op has run on two threads a forked child can run it too, and finds the same.

    What `call` leaves to torch must be small enough for one thread: torch's OpenMP does not survive a fork.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = call()
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=lambda: answers.put(call()), daemon=True)
        child.start()
    finally:
        torch.set_num_threads(before)
    child.join(120)  # a slow machine is no failure
    assert child.exitcode == 0, "None: it hangs"
    assert answers.get() == wanted
