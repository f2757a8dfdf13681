"""Which backend serves a call, and what the user is told when one cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import _backend, native, triton

SCORES = torch.tensor([[1.0, 3.0, 2.0]])


@pytest.fixture(autouse=True)
def _fresh_choices():
    _backend._choose.cache_clear()
    yield
    _backend._choose.cache_clear()


def served_by(monkeypatch, device: str) -> str:
    """Name of the backend that would serve tensors of a device that need not exist."""
    monkeypatch.setattr(_backend, "_implementation", lambda backend, family, op: backend)
    monkeypatch.setattr(_backend, "_cpu_engine_by_default", False)
    tensor = SimpleNamespace(device=torch.device(device), numel=lambda: 100)
    return _backend.implementation("score", "head_scores", tensor)


def test_auto_takes_the_engine_for_cpu_tensors_and_triton_for_cuda_tensors(monkeypatch):
    monkeypatch.setattr(native, "unavailable", "")
    monkeypatch.setattr(triton, "unavailable", lambda device_type=None: "")
    assert served_by(monkeypatch, "cpu") == "cpu"
    assert served_by(monkeypatch, "cuda") == "triton"


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_auto_falls_back_to_the_reference_and_says_why(monkeypatch, device):
    monkeypatch.setattr(native, "unavailable", "no compiler was found")
    with pytest.warns(UserWarning, match="slow reference backend, '(cpu|triton)' cannot serve here: .+"):
        assert served_by(monkeypatch, device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(monkeypatch, device) == "reference"  # once is enough


@pytest.mark.skipif(torch.cuda.is_available() or triton.INTERPRETED, reason="Triton can serve here")
def test_triton_without_a_gpu_names_cause_and_remedy():
    with ck.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        ck.segmented_topk(SCORES, 2)
    message = str(caught.value)
    assert message.startswith("backend 'triton' cannot serve here: torch sees no CUDA device.")
    assert "Install a CUDA build of torch" in message
    assert "\n" not in message
    assert "no CUDA device" in ck.backends()["triton"]


def test_triton_without_its_package_names_cause_and_remedy(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    with ck.use_backend("triton"), pytest.raises(RuntimeError, match=r"package triton is missing\. Install it with"):
        ck.segmented_topk(SCORES, 2)


def test_triton_refuses_tensors_that_are_not_on_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with ck.use_backend("triton"), pytest.raises(RuntimeError, match=r"CUDA tensors, not on 'cpu'\. Move them"):
        ck.segmented_topk(SCORES, 2)


def test_cpu_refuses_tensors_that_are_not_on_the_cpu(monkeypatch):
    with ck.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cannot serve tensors on 'cuda'\. Move them"):
        served_by(monkeypatch, "cuda")


def test_contexts_nest_and_end():
    with ck.use_backend("reference"):
        with ck.use_backend("auto"):
            assert _backend._forced.get() == "auto"
        assert _backend._forced.get() == "reference"
    assert _backend._forced.get() is None


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_the_environment_forces_a_backend(name):
    code = (
        "import torch, cacovid_kernels as ck\n"
        "from cacovid_kernels import _backend\n"
        "_backend._implementation = lambda backend, family, op: lambda *args: (print(backend), exit())\n"
        "ck.segmented_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)\n"
    )
    environment = {"CACOVID_BACKEND": name, "TRITON_INTERPRET": "1", "PATH": ""}
    if ck.backends()[name] and name != "triton":
        pytest.skip(ck.backends()[name])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == name, run.stderr
