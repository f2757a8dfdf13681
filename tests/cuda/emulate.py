"""Builds the package with CUDA kernels that run on the CPU, for the tests beside this file.

    python tests/cuda/emulate.py [build/emulated]

The folder gets a package of links to the checkout's Python files and the emulated module; on PYTHONPATH it comes before
the checkout. Builds again only what changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "cacovid_kernels"


def compile_cpp(source: Path, work: Path, target: str, *options: str) -> str:
    """Configures `source` in `work` and builds `target`; returns what went wrong, or an empty string."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    commands = [["cmake", "--build", str(work), "--target", target]]
    if not (work / "build.ninja").exists():
        commands.insert(0, ["cmake", "-S", str(source), "-B", str(work), "-G", "Ninja", *options])
    for command in commands:
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            return run.stdout
    return ""


def build(source: Path, folder: Path) -> str:
    """Makes `folder` a place to import the package of `source` from, with emulated kernels; returns what went wrong."""
    import pybind11

    package, work, begun = folder / PACKAGE, folder / "work", time.time()
    package.mkdir(parents=True, exist_ok=True)
    wrong = compile_cpp(
        source, work, "_C", "-DCACOVID_PYTHON=ON", "-DCACOVID_TESTS=OFF", "-DCACOVID_CUDA=emulated",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )  # fmt: skip
    if wrong:
        return wrong
    links = {
        path.name: path for path in (source / PACKAGE).iterdir() if path.suffix != ".so" and path.name != "__pycache__"
    }
    links |= {path.name: path for path in work.glob("_C*.so")}
    for old in package.iterdir():
        if old.name not in links:
            old.unlink()
    for name, path in links.items():
        if not (package / name).exists():
            (package / name).unlink(missing_ok=True)  # a link to what is gone
            (package / name).symlink_to(path)
    built = folder / "built"  # what is newer than this file is not in the module
    built.touch()
    os.utime(built, (begun, begun))
    return ""


if __name__ == "__main__":
    sys.exit(build(ROOT, Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "emulated").resolve()) or 0)
