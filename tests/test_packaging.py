"""What users install: import cost, optional parts, the fallback without a compiled module."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    assert "backend 'gpu' must be one of ['auto', 'cpu', 'triton', 'reference']" in run.stderr
    with pytest.raises(ValueError, match="use_backend: backend 'fast' must be one of"), ck.use_backend("fast"):
        pass


def test_core_has_no_torch_and_no_python_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".inl"}:
            text = path.read_text()
            for banned in ("torch/", "ATen/", "Python.h", "pybind11"):
                assert f"<{banned}" not in text, f"{path} includes {banned}"


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


def test_stub_names_exactly_what_the_module_has():
    stub = ast.parse((ROOT / "cacovid_kernels" / "_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in dir(ck.native._C) if not name.startswith("_")}


def test_every_public_name_has_a_docstring_with_an_example():
    for name in ck.__all__:
        text = getattr(ck, name).__doc__ or ""
        assert len(text) > 40, name
        if name[0].islower():
            assert "Example:" in text, name
            assert ">>>" in text, name
