"""Child processes of `make gpu`: their environment, their end, their output."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]


def import_folders(dry: bool) -> list[str]:
    """This checkout; in a dry run before it the package with emulated CUDA kernels, if `make test` has built it."""
    emulated = ROOT / "build" / "emulated"
    return [*([str(emulated)] if dry and (emulated / "cacovid_kernels").exists() else []), str(ROOT)]


def environment(dry: bool, **extra: str) -> dict[str, str]:
    """For child processes: this checkout, and in a dry run Triton's interpreter."""
    path = os.pathsep.join(filter(None, [*import_folders(dry), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **({"TRITON_INTERPRET": "1"} if dry else {}), **extra}


def begin(command: list[str], env: dict[str, str], out: IO[str]) -> subprocess.Popen:
    """In a process group of its own, so that it can be stopped together with what it starts."""
    return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and output."""
    with tempfile.TemporaryFile("w+") as out:
        process = begin(command, env, out)
        try:
            code: int | None = process.wait(timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            stop(process)
            code = None
        out.seek(0)
        return code, out.read()


def find_tool(name: str) -> str | None:
    folders = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
