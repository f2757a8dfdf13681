"""Which backend serves a call, and what the user is told when one cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import _backend, _order, cuda, native, triton

REFERENCES = sorted((Path(ck.__file__).parent / "reference").glob("*.py"))
SCORES = torch.tensor([[1.0, 3.0, 2.0]])


@pytest.fixture(autouse=True)
def _fresh_choices():
    _backend._choose.cache_clear()
    yield
    _backend._choose.cache_clear()


def served_by(monkeypatch, device: str, op: str = "head_scores", elements: int = 100) -> str:
    """Name of the backend that would serve tensors of a device that need not exist."""
    monkeypatch.setattr(_backend, "_implementation", lambda backend, family, op: backend)
    monkeypatch.setattr(_backend, "_cpu_engine_by_default", False)
    tensor = SimpleNamespace(device=torch.device(device), numel=lambda: elements)
    return _backend.implementation("", op, tensor)


@pytest.fixture
def gpu_backends(monkeypatch):
    """Sets which GPU backends can serve."""

    def set_them(**reasons: str) -> None:
        monkeypatch.setattr(cuda, "unavailable", lambda device_type=None: reasons.get("cuda", ""))
        monkeypatch.setattr(triton, "unavailable", lambda device_type=None: reasons.get("triton", ""))
        _backend._choose.cache_clear()

    set_them()
    return set_them


def test_auto_takes_the_engine_for_cpu_tensors(monkeypatch, gpu_backends):
    monkeypatch.setattr(native, "unavailable", "")
    assert served_by(monkeypatch, "cpu") == "cpu"
    assert served_by(monkeypatch, "cpu", "gather_rows") == "cpu"


def test_auto_takes_cuda_where_there_is_a_kernel_else_triton(monkeypatch, gpu_backends):
    assert served_by(monkeypatch, "cuda", "gather_rows") == "cuda"
    assert served_by(monkeypatch, "cuda", "head_scores") == "triton"


def test_auto_takes_the_other_gpu_backend_where_one_cannot_serve(monkeypatch, gpu_backends):
    gpu_backends(cuda="it was built without nvcc")
    assert served_by(monkeypatch, "cuda", "gather_rows") == "triton"
    gpu_backends(triton="it is missing")
    assert served_by(monkeypatch, "cuda", "gather_rows") == "cuda"
    with pytest.warns(UserWarning, match="'triton' cannot serve here: it is missing"):
        assert served_by(monkeypatch, "cuda", "head_scores") == "reference"


def test_auto_can_change_its_mind_with_the_size(monkeypatch, gpu_backends):
    small, large = _order.Rule(1000, "cuda", "small"), _order.Rule(_order.ALL, "triton", "large")
    monkeypatch.setitem(_order.TABLE, "gather_rows", (small, large))
    assert [served_by(monkeypatch, "cuda", "gather_rows", n) for n in (0, 1000, 1001, 2**40)] == [
        "cuda", "cuda", "triton", "triton",
    ]  # fmt: skip


def test_every_rule_is_for_an_op_that_has_the_kernel():
    """And every CUDA kernel has its rule, or "auto" would never take it."""
    families = {op: op_family(op) for op in torch.ops.cacovid}
    assert _order.TABLE.keys() <= families.keys()
    for op, family in families.items():
        served = {name: has_kernel(name, family, op) for name in ("cuda", "triton")}
        assert served["cuda"] == (op in _order.TABLE), op
        assert served["triton"], op
        assert _order.rules(op)[-1].most == _order.ALL
        assert all(rule.reason and served[rule.backend] for rule in _order.rules(op))


def test_an_op_without_a_cuda_kernel_names_the_remedy():
    with pytest.raises(RuntimeError) as caught:
        _backend._implementation("cuda", "score", "head_scores")
    assert str(caught.value) == "backend 'cuda' has no kernel for head_scores. Use 'auto', which knows who has."


def op_family(op: str) -> str:
    """The family of an op, from where its reference stands."""
    return next(path.stem for path in REFERENCES if f"def {op}(" in path.read_text())


def has_kernel(backend: str, family: str, op: str) -> bool:
    try:
        return callable(_backend._implementation(backend, family, op))
    except RuntimeError:
        return False


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


@pytest.mark.skipif(cuda.EMULATED or torch.cuda.is_available(), reason="CUDA kernels run here")
def test_cuda_without_a_gpu_names_cause_and_remedy():
    with (
        ck.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"backend 'cuda' cannot serve here: .+ (use|Install)"),
    ):
        ck.gather_tokens(SCORES, torch.tensor([0]), dim=0)
    assert "\n" not in ck.backends()["cuda"]


@pytest.fixture
def built_for(monkeypatch):
    """Pretends that the module has kernels for these architectures, on a machine with this GPU."""

    def set_them(architectures: str | None, capability: tuple[int, int] | None = None) -> None:
        kernels = architectures and SimpleNamespace(architectures=architectures, versions=lambda: (13000, 13000))
        monkeypatch.setattr(cuda, "_kernels", kernels or None)
        monkeypatch.setattr(cuda, "EMULATED", architectures == "emulated")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(native, "unavailable", "")
    return set_them


def test_cuda_wants_a_driver_of_its_major_version(built_for, monkeypatch):
    built_for("90", (9, 0))
    monkeypatch.setattr(cuda._kernels, "versions", lambda: (12080, 13000))
    assert cuda.unavailable("cuda") == (
        "the module was built with CUDA 13, the driver serves 12.8. "
        "Install a newer driver, or build with an older toolkit."
    )
    monkeypatch.setattr(cuda._kernels, "versions", lambda: (13010, 13020))
    assert cuda.unavailable("cuda") == ""


@pytest.mark.parametrize(
    "architectures, capability, device_type, words",
    [
        (None, (9, 0), "cuda", "has no CUDA kernels. Install with nvcc on the path, or use 'triton'."),
        ("80-real,90", None, None, "torch sees no CUDA device. Install"),
        ("80-real,90", (9, 0), "cpu", "it runs on CUDA tensors, not on 'cpu'. Move them"),
        ("80-real,90", (7, 5), "cuda", "its kernels are for sm_80, sm_90, this GPU is sm_75. Use 'triton'."),
        ("80-real,90-real", (10, 0), "cuda", "this GPU is sm_100"),
        ("86-real", (8, 0), "cuda", "this GPU is sm_80"),
        ("emulated", None, "cuda", "for CPU tensors, not 'cuda'"),
        ("80-real,90", (8, 6), "cuda", ""),
        ("80-real,90", (9, 0), None, ""),
        ("80-real,90", (10, 3), "cuda", ""),
        ("90", (12, 0), "cuda", ""),
        ("emulated", None, "cpu", ""),
    ],
)
def test_cuda_says_why_it_cannot_serve(built_for, architectures, capability, device_type, words):
    built_for(architectures, capability)
    reason = cuda.unavailable(device_type)
    assert words in reason
    assert bool(reason) == bool(words)
    assert "\n" not in reason


def test_cuda_without_a_module(monkeypatch):
    monkeypatch.setattr(native, "unavailable", "the compiled module is missing.")
    assert cuda.unavailable() == "the compiled module is missing."
    monkeypatch.setattr(cuda, "_kernels", None)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve: the compiled module is missing"):
        cuda.kernels()


def test_cpu_refuses_tensors_that_are_not_on_the_cpu(monkeypatch):
    with ck.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cannot serve tensors on 'cuda'\. Move them"):
        served_by(monkeypatch, "cuda")


def test_contexts_nest_and_end():
    with ck.use_backend("reference"):
        with ck.use_backend("auto"):
            assert _backend._forced.get() == "auto"
        assert _backend._forced.get() == "reference"
    assert _backend._forced.get() is None


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda", "triton"])
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
