"""What users install: import cost, optional parts, the fallback without a compiled module."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomllib

import cacovid_kernels as ck

ROOT = Path(__file__).parents[1]


def python(script: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True, check=False)


def test_import_brings_in_nothing_optional():
    script = (
        "import sys, cacovid_kernels\n"
        "optional = ('triton', 'transformers', 'safetensors', 'av', 'matplotlib', 'PIL', 'rich', 'tokenizers')\n"
        "print([name for name in optional if name in sys.modules])"
    )
    run = python(script)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_demo_needs_nothing_of_training():
    """Whose packages the extra `demo` does not install."""
    script = (
        "import sys, cacovid_kernels.demo.command, cacovid_kernels.demo.world.rows\n"
        "print([name for name in sys.modules if name.startswith('cacovid_kernels.training')])"
    )
    run = python(script)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_import_starts_no_thread_and_no_cuda():
    script = (
        "import os, torch\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import cacovid_kernels\n"
        "print(len(os.listdir('/proc/self/task')) - before, torch.cuda.is_initialized())"
    )
    assert python(script).stdout.split() == ["0", "False"]


def test_without_the_compiled_module_the_reference_answers_and_says_so_once():
    script = (
        "import sys, warnings\n"
        "sys.modules['cacovid_kernels._C'] = None\n"
        "import torch, cacovid_kernels as ck\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        kept = ck.select_tokens(torch.arange(12.0).reshape(3, 4), keep_ratio=0.5, importance_ratio=1.0)\n"
        "print(kept.indices.tolist(), len(caught), caught[0].message)\n"
        "try:\n"
        "    with ck.use_backend('cpu'):\n"
        "        ck.segmented_topk(torch.zeros(4), 1)\n"
        "except RuntimeError as error:\n"
        "    print(error)"
    )
    run = python(script)
    first, second = run.stdout.splitlines()
    assert first.startswith("[2, 3, 6, 7, 10, 11] 1 cacovid_kernels answers through its slow reference backend"), run
    assert second.startswith("backend 'cpu' cannot serve here: the compiled module cacovid_kernels._C is missing")


def test_backend_can_be_forced_by_the_environment_and_in_a_block():
    run = subprocess.run(
        [sys.executable, "-c", "import torch, cacovid_kernels as ck; ck.segmented_topk(torch.zeros(4), 1)"],
        env={"CACOVID_BACKEND": "gpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "backend 'gpu' must be one of ['auto', 'cpu', 'cuda', 'triton', 'reference']" in run.stderr
    with pytest.raises(ValueError, match="use_backend: backend 'fast' must be one of"), ck.use_backend("fast"):
        pass


def test_core_has_no_torch_and_no_python_header():
    banned = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)\b")
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".inl", ".cu", ".cuh"}:
            found = banned.search(path.read_text())
            assert not found, f"{path}: {found}"


def test_build_needs_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not any("torch" in requirement for requirement in project["build-system"]["requires"])
    imported = {
        name.name
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert "torch" not in imported


def test_an_sdist_has_what_a_build_needs(tmp_path):
    """Of a copy without what builds leave, as setuptools takes along the list of files that an earlier one left."""
    copy = tmp_path / "copy"
    leavings = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("cacovid_kernels", "csrc", "python", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=leavings)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    script = f"from setuptools import build_meta\nbuild_meta.build_sdist({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = set(re.findall(r"\b(?:csrc|python)/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert len(listed) > 30
    assert listed <= names, listed - names
    folders = ("cacovid_kernels", "csrc/include", "csrc/cpu", "csrc/cuda", "python")
    files = {str(p.relative_to(copy)) for folder in folders for p in (copy / folder).rglob("*") if p.is_file()}
    assert files | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names, files - names
    assert not [name for name in names if name.startswith(("tests/", "csrc/tests/")) or name.endswith(".so")]


def test_stub_names_exactly_what_the_module_has():
    stub = ast.parse((ROOT / "cacovid_kernels" / "_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    optional = {"cuda"}  # where the module was built with nvcc; called through cuda.kernels(), which has no types
    assert named == {name for name in dir(ck.native._C) if not name.startswith("_")} - optional


@pytest.fixture
def build_script(monkeypatch):
    """setup.py as a module, on a machine without nvcc unless a test says otherwise."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("CACOVID_CUDA", raising=False)
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    return module


def test_cuda_is_built_where_it_is_asked_for(build_script, monkeypatch):
    assert build_script.cuda_option() == "auto"
    for value in ("0", "auto", "emulated"):
        monkeypatch.setenv("CACOVID_CUDA", value)
        assert build_script.cuda_option() == value
    monkeypatch.setenv("CACOVID_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^CACOVID_CUDA=1 found no nvcc on PATH.+ Install the CUDA toolkit.+\.$"):
        build_script.cuda_option()
    monkeypatch.setattr(build_script, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    assert build_script.cuda_option() == "1"
    monkeypatch.setenv("CACOVID_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"CACOVID_CUDA='yes' must be auto, 0, 1 or emulated"):
        build_script.cuda_option()


@pytest.mark.parametrize("cuda, runs", [("0", False), ("auto", True)])
def test_the_core_configures_alone_and_asks_nvcc_only_when_told(tmp_path, cuda, runs):
    """No Python is looked for; a broken nvcc is no reason not to build the rest."""
    asked = tmp_path / "asked"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {asked}\nexit 1\n")
    nvcc.chmod(0o755)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CUDACXX": str(nvcc)}
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DCACOVID_CUDA={cuda}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert asked.exists() == runs
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "Python_EXECUTABLE" not in cache
    assert "pybind11" not in cache
    tests = subprocess.run(["ctest", "--test-dir", tmp_path / "build", "-N"], env=environment, capture_output=True)
    assert b"test_cuda_gather" in tests.stdout


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is missing")
def test_the_module_loads_without_a_driver_and_without_a_toolkit():
    run = subprocess.run(["readelf", "-d", ck.native._C.__file__], capture_output=True, text=True, check=True)
    needed = [line for line in run.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not any("cuda" in line or "torch" in line for line in needed)


def test_every_public_name_has_a_docstring_with_an_example():
    for name in ck.__all__:
        text = getattr(ck, name).__doc__ or ""
        assert len(text) > 40, name
        if name[0].islower():
            assert "Example:" in text, name
            assert ">>>" in text, name
