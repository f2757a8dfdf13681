"""`python -m cacovid_kernels doctor`: what is installed, which backends work, and a self-test of each."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels import _order, cuda, triton

SECONDS = 1.0  # of self-test per backend
PACKAGES = ("numpy", "triton", "transformers", "safetensors", "av", "pillow", "rich")

Probe = Callable[[torch.Generator, str], tuple[Tensor, ...]]  # fresh inputs from the generator -> results


def examine() -> int:
    """Print versions, the native module and every backend with its self-test.

    Returns:
        0 when at least one backend works and none of the working ones gives a wrong answer, else 1.
    """
    for section, rows in (("versions", _versions()), ("native module", _native()), (_auto_title(), _auto())):
        print(section)
        width = max(16, *(len(name) for name, _ in rows))
        for name, value in rows:
            print(f"  {name:<{width}} {value}")
    print("backends")
    usable, wrong = False, False
    for name, reason in ck.backends().items():
        if reason:
            print(f"  {name:<16} not available: {reason}")
            continue
        right, fault = self_test(name, SECONDS)
        wrong |= bool(fault)
        usable |= not fault
        print(f"  {name:<16} {f'WRONG: {fault}' if fault else f'works: {right}'}")
    print("cacovid_kernels is usable." if usable and not wrong else "cacovid_kernels is NOT usable: see above.")
    return 0 if usable and not wrong else 1


def self_test(backend: str, seconds: float) -> tuple[str, str]:
    """Hold a backend against answers that are written down, then against the reference on random inputs.

    Args:
        backend: a backend that `backends()` calls available.
        seconds: how long to compare with the reference; every op is compared at least once.

    Returns:
        What was right, and what went wrong (empty: nothing).
    """
    on_cpu = {"cuda": cuda.EMULATED, "triton": triton.INTERPRETED}.get(backend, True)
    device = "cpu" if on_cpu else "cuda"
    known = 0
    try:
        with ck.use_backend(backend):
            for name, (call, answer) in KNOWN_ANSWERS.items():
                result = _unless_absent(call, device)
                if result is not None and (found := result.tolist()) != answer:
                    return "", f"{name} gave {found} instead of {answer}"
                known += result is not None
        right = f"{known} known answers"
        if backend == "reference":
            return right, ""
        compared, absent, fault = _compare(backend, device, seconds)
        right += f", {compared} results equal to the reference in {seconds:g} s"
        return right + (f"; no kernels for {', '.join(sorted(absent))}" if absent else ""), fault
    except Exception as error:  # whatever is broken, the report goes on
        return "", f"{type(error).__name__}: {error}"


def _unless_absent(call: Callable[..., Any], *args: object) -> Any:
    """What the call returns, or None where the backend has no kernel for it."""
    try:
        return call(*args)
    except RuntimeError as error:
        if "has no kernel for" not in str(error):
            raise
        return None


def _compare(backend: str, device: str, seconds: float) -> tuple[int, set[str], str]:
    """How many results agree with the reference, what the backend has no kernels for, and the first op that differs."""
    generator = torch.Generator().manual_seed(0)
    deadline = time.monotonic() + seconds
    compared = 0
    absent: set[str] = set()
    while not compared or time.monotonic() < deadline:
        for name, probe in PROBES.items():
            if name in absent:
                continue
            state = generator.get_state()
            with ck.use_backend(backend):
                found = _unless_absent(probe, generator, device)
            if found is None:
                absent.add(name)
                continue
            generator.set_state(state)
            with ck.use_backend("reference"):
                expected = probe(generator, device)
            if not all(_same(a, b) for a, b in zip(found, expected, strict=True)):
                return compared, absent, f"{name} differs from the reference backend"
            compared += 1
        if len(absent) == len(PROBES):
            break
    return compared, absent, ""


def _same(found: Tensor, expected: Tensor) -> bool:
    # Indices and copies are promised bit for bit, computed scores and probabilities closely.
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return torch.equal(found, expected)


def _small_selection(device: str) -> ck.Selection:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.7, 0.2]], device=device)
    return ck.select_tokens(scores, keep_ratio=0.5, importance_ratio=1.0)


KNOWN_ANSWERS: dict[str, tuple[Callable[[str], Tensor], list]] = {
    "select_tokens": (lambda device: _small_selection(device).indices, [1, 3, 4, 6]),
    "segmented_topk": (
        lambda device: ck.segmented_topk(torch.tensor([0.3, 0.1, 0.2, 0.5, 0.5], device=device), 1, [0, 3, 5]),
        [0, 3],
    ),
    "gather_tokens": (
        lambda device: ck.gather_tokens(torch.arange(0, 80, 10, device=device), _small_selection(device)),
        [10, 30, 40, 60],
    ),
    "gumbel_topk": (
        lambda device: ck.gumbel_topk(torch.arange(6.0, device=device), 3, seed=1).indices,
        [5, 4, 2],
    ),
}


def _select(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    grid = [(4, 5, 6), (1, 7, 3), (8, 4, 4)]
    tokens = torch.randn(269, generator=generator).mul(8).round().div(8)  # with ties
    frames = torch.randn(13, generator=generator)
    selection = ck.select_tokens(tokens.to(device), frames.to(device), grid, keep_ratio=0.3)
    return selection.indices, selection.frame_counts, selection.status


def _topk(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    scores = torch.randn(6, 196, generator=generator)
    scores[2, ::7], scores[3] = float("nan"), float("-inf")
    return (ck.segmented_topk(scores.to(device), 20),)


def _sample(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    logits = torch.randn(3, 64, generator=generator).to(device)
    seed = int(torch.randint(2**40, (), generator=generator))
    return tuple(ck.gumbel_topk(logits, 9, num_samples=4, seed=seed))


def _gather(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    index = torch.randint(-1, 96, (3, 20), generator=generator).to(device)
    hidden = torch.randn(96, 40, generator=generator, dtype=torch.float64).to(device)
    return tuple(ck.gather_tokens((hidden, hidden.bfloat16(), torch.arange(96, device=device)), index))


def _combine(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    tokens, frames = torch.randn(5, 49, generator=generator), torch.randn(5, generator=generator)
    seed = int(torch.randint(2**40, (), generator=generator))
    drawn = ck.sample_combinations(
        tokens.to(device), frames.to(device), num_samples=6, keep_ratio=0.1, num_frame_samples=3, seed=seed
    )
    return drawn.indices, drawn.groups, drawn.frame_indices, drawn.log_prob


def _repack(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    keys = [torch.randn(2, 3, 40, 8, generator=generator).to(device) for _ in range(2)]
    keep = torch.randperm(40, generator=generator)[:9].sort().values.to(device)
    short_keys, short_values = ck.repack_kv((keys, keys), keep)
    return (*short_keys, *short_values)


def _repack_pages(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    keys = torch.randn(12, 8, 3, 16, generator=generator).to(device)
    table = torch.randperm(12, generator=generator).view(2, 6).to(device)
    lengths = torch.randint(20, 49, (2,), generator=generator).to(device)
    keep = torch.randperm(20, generator=generator)[:9].sort().values.to(device)
    kept = ck.repack_paged_kv((keys, keys + 1), table, lengths, keep)
    return (*kept.keys, *kept.values, kept.block_table, kept.freed_blocks, kept.num_freed, kept.status)


def _policy_loss(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    logits, old = (torch.randn(70, generator=generator).to(device) for _ in range(2))
    masks = (torch.rand(9, 70, generator=generator) < 0.2).to(device)
    rewards = torch.randn(9, generator=generator).to(device)
    logits.requires_grad_()
    sums = ck.combination_sums(masks, rewards)
    loss = sums.loss(logits, old, kl_weight=0.1)
    return ck.pack_masks(masks), sums.values, loss.detach(), torch.autograd.grad(loss, logits)[0]


@torch.no_grad()
def _score(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    head = ck.PolicyHead(32)
    for weight in head.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    hidden = torch.randn(3, 20, 32, generator=generator).to(device)
    tokens, frames = ck.score_tokens(hidden, head.to(device), head, norm_weight=torch.ones(32, device=device))
    assert frames is not None
    return tokens, frames


def _attention(generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    query = torch.randn(2, 4, 3, 16, generator=generator).to(device)
    keys = torch.randn(2, 2, 90, 16, generator=generator).to(device)
    return (ck.attention_scores(query, keys, row_positions=torch.tensor([60, 80, 89], device=device)),)


PROBES: dict[str, Probe] = {
    "score_tokens": _score,
    "attention_scores": _attention,
    "select_tokens": _select,
    "segmented_topk": _topk,
    "gumbel_topk": _sample,
    "sample_combinations": _combine,
    "combination_policy_loss": _policy_loss,
    "gather_tokens": _gather,
    "repack_kv": _repack,
    "repack_paged_kv": _repack_pages,
}


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("cacovid_kernels", ck.__version__),
        ("python", f"{platform.python_version()} ({platform.machine()}, {platform.system()})"),
        ("torch", torch.__version__),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPU", ", ".join(gpus) or "torch sees none"))
    return rows


def _native() -> list[tuple[str, str]]:
    try:
        module = importlib.import_module("cacovid_kernels._C")
    except ImportError as error:
        return [("built", f"no ({error}). Install a C++17 compiler and run `pip install .`.")]
    return [
        ("built", str(module.__file__)),
        ("compiler", module.compiler),
        ("instructions", f"{module.cpu_isa}, chosen at run time"),
        ("threads", f"{torch.get_num_threads()}, torch.set_num_threads changes it"),
        ("CUDA kernels", _cuda_kernels()),
    ]


def _cuda_kernels() -> str:
    """What the CUDA kernels were built for, and which of the GPUs here they run on."""
    built = cuda.architectures()
    if built is None:
        return "none. Install again with nvcc on the path, or use Triton."
    if cuda.EMULATED:
        return "emulated on the CPU, for tests"
    names = [("sm_{}" if name.endswith("-real") else "sm_{} and newer").format(name.partition("-")[0])
             for name in built.split(",")]  # fmt: skip
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    here = [f"GPU {i}: {cuda.unsupported(built, gpu) or 'covered'}" for i, gpu in enumerate(gpus)]
    return "; ".join([f"for {', '.join(names)}", *here])


def _auto_title() -> str:
    evidence = f"measured in {', '.join(_order.MEASURED)}" if _order.MEASURED else "a guess: nothing was measured yet"
    return f'what "auto" takes for CUDA tensors ({evidence})'


def _auto() -> list[tuple[str, str]]:
    """For every op the GPU backends by size of its first tensor, each with the reason, or with why it cannot serve."""
    reasons = {"cuda": cuda.unavailable("cuda"), "triton": triton.unavailable("cuda")}
    rows = []
    for op in sorted(torch.ops.cacovid):
        parts = []
        for rule in _order.rules(op):
            upto = "" if rule.most == _order.ALL else f"up to {rule.most:,.0f} elements "
            parts.append(f"{upto}{rule.backend}: {rule.reason}")
        first, *others = _order.order(op, 0)
        if reasons[first] and not all(reasons.values()):
            parts.append(f"here {' or '.join(others) or 'reference'}, {first} cannot serve")
        rows.append((op, "; ".join(parts)))
    return rows
