"""The examples in docstrings and README run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import cacovid_kernels

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(cacovid_kernels.__path__, "cacovid_kernels.")
    if not name.endswith(("_C", "__main__"))
]

AT_THE_ROOT = ("*.md", "*.txt", "*.toml", "*.py", "*.in", "Makefile")
BINARY = (".npz", ".png", ".pyc", ".safetensors", ".so")

# Modules whose package is not among those that tests install.
NEEDS = {"cacovid_kernels.integrations.kvpress": "kvpress", "cacovid_kernels.integrations.lmms_eval.model": "lmms_eval"}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], exc_type=ImportError)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert failed == 0


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_repository_speaks_of_the_product_alone():
    banned = re.compile(r"/(?:work|tmp)/|\b(?:TOD[O]|FIXM[E]|XX[X])\b")  # brackets: this line does not match itself
    paths = [ROOT / ".ci" / "run", *(path for form in AT_THE_ROOT for path in ROOT.glob(form))]
    for folder in ("cacovid_kernels", "csrc", "python", "bench", "docs", "examples", "tests"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in BINARY]
    hidden = re.compile(r"/\.(?!ci/)")  # what tools leave behind
    for path in paths:
        if hidden.search(str(path.relative_to(ROOT.parent))):
            continue
        found = banned.search(path.read_text())
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_readme_tables_are_what_the_results_say():
    command = [sys.executable, str(ROOT / "bench" / "readme.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
