"""Builds the native module `_C` with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_option() -> str:
    """Whether to build the CUDA kernels: CACOVID_CUDA, or one line that says why it cannot be."""
    wanted = os.environ.get("CACOVID_CUDA", "auto")
    if wanted not in ("auto", "0", "1", "emulated"):
        sys.exit(f"CACOVID_CUDA={wanted!r} must be auto, 0, 1 or emulated. Unset it to build what nvcc is there for.")
    if wanted == "1" and find_nvcc() is None:
        sys.exit("CACOVID_CUDA=1 found no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda. "
                 "Install the CUDA toolkit, name its folder in CUDA_HOME, or set CACOVID_CUDA=0.")  # fmt: skip
    return wanted


def find_nvcc() -> str | None:
    """nvcc, which toolkits often leave off the path."""
    folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", "/usr/local/cuda/bin"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=path)


class CMakeBuild(build_ext):
    """Runs CMake and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            "-DCACOVID_PYTHON=ON", "-DCACOVID_TESTS=OFF",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCACOVID_SANITIZE={os.environ.get('CACOVID_SANITIZE', '')}",
            f"-DCACOVID_CUDA={cuda_option()}",
        ]  # fmt: skip
        # cmake and ninja may be installed beside this Python without its bin folder being on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        if nvcc := find_nvcc():
            env["CUDACXX"] = nvcc
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(work)], check=True, env=env)


if __name__ == "__main__":  # also where pip runs it
    setup(ext_modules=[Extension("cacovid_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
