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


EMULATED = ROOT / "build" / "emulated"


def native_sources() -> list[Path]:
    """What the native module is built from."""
    return [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*"), *(ROOT / "python").glob("*.*")]


def no_emulated_kernels() -> str:
    """Why a dry run has no CUDA kernels on the CPU; empty where tests/cuda/emulate.py has built what is in the sources.

    Its package is links to the checkout's Python files: those are never old, but one of them may be missing.
    """
    built, package = EMULATED / "built", EMULATED / "cacovid_kernels"
    if not built.exists():
        return "there is no build/emulated: run `make emulated`"
    newest = max(native_sources(), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > built.stat().st_mtime:
        return f"build/emulated is older than {newest.relative_to(ROOT)}: run `make emulated`"
    names = {path.name for path in (ROOT / "cacovid_kernels").iterdir() if path.suffix != ".so"} - {"__pycache__"}
    missing = sorted(name for name in names if not (package / name).exists())
    return f"build/emulated lacks {', '.join(missing)}: run `make emulated`" if missing else ""


def import_folders(dry: bool) -> list[str]:
    """This checkout; in a dry run before it the package with emulated CUDA kernels, if `make test` has built it."""
    return [*([str(EMULATED)] if dry and not no_emulated_kernels() else []), str(ROOT)]


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
