"""Builds the native module `_C` with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
            f"-DCACOVID_CUDA={os.environ.get('CACOVID_CUDA', 'auto')}",
        ]  # fmt: skip
        # cmake and ninja may be installed beside this Python without its bin folder being on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(work)], check=True, env=env)


setup(ext_modules=[Extension("cacovid_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
