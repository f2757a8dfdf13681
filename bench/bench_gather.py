"""Compaction of a 7B-sized prompt (3584 channels, bfloat16), of combinations, and its gradient."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

import cacovid_kernels as ck

SIZE = 3584


@lru_cache(maxsize=1)
def embeddings(frames: int) -> Tensor:
    return torch.randn(frames * 196, SIZE, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))


def kept(tokens: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(tokens, generator=generator)[: tokens // 10].sort().values for _ in range(count)]


@pytest.mark.parametrize("frames", [32, 512])  # 4.5 MB of results, and 72 MB: within and beyond the last-level cache
@pytest.mark.parametrize("contestant", ["ours", "index_select(out=)", "index_select", "x[mask]"])
def bench_gather(race, frames, contestant):
    x = embeddings(frames)
    n = x.shape[0]
    out = torch.zeros(n // 10, SIZE, dtype=x.dtype)
    indices = kept(n, 50)
    if contestant == "x[mask]":
        indices = [torch.zeros(n, dtype=torch.bool).scatter_(0, i, True) for i in indices]
    calls = {
        "ours": lambda i: ck.gather_tokens(x, i, dim=0, out=out),
        "index_select(out=)": lambda i: torch.index_select(x, 0, i, out=out),
        "index_select": lambda i: x.index_select(0, i),
        "x[mask]": lambda mask: x[mask],
    }
    targets = {"index_select(out=)": 0.95} | ({"index_select": 3} if frames == 512 else {})
    race(f"gather 10% of {frames} x 196", contestant, calls[contestant], [(i,) for i in indices], targets)


@pytest.mark.parametrize("contestant", ["ours", "index_select", "x[index]"])
def bench_gather_to_new_memory(race, contestant):
    x = embeddings(512)
    calls = {
        "ours": lambda i: ck.gather_tokens(x, i, dim=0),
        "index_select": lambda i: x.index_select(0, i),
        "x[index]": lambda i: x[i],
    }
    inputs = [(i,) for i in kept(x.shape[0], 50)]
    race("gather 10% of 512 x 196, new memory", contestant, calls[contestant], inputs, {"index_select": 3})


@pytest.mark.parametrize("contestant", ["ours", "index_select each"])
def bench_gather_prompt(race, contestant):
    x = embeddings(32)
    n = x.shape[0]
    prompt = {
        "embeds": x,
        "positions": torch.arange(3 * n).view(3, n),
        "mask": torch.ones(n),
        "labels": torch.arange(n),
    }
    out = ck.gather_tokens(prompt, torch.arange(n // 10), dim={"embeds": 0})
    calls = {
        "ours": lambda i: ck.gather_tokens(prompt, i, dim={"embeds": 0}, out=out),
        "index_select each": lambda i: [
            torch.index_select(prompt[name], prompt[name].dim() - 1 if name == "positions" else 0, i, out=out[name])
            for name in prompt
        ],
    }
    inputs = [(i,) for i in kept(n, 50)]
    race("gather a prompt: 4 tensors", contestant, calls[contestant], inputs, {"index_select each": 0.95})


@pytest.mark.parametrize("contestant", ["ours", "x[index]", "repeat, then gather"])
def bench_gather_combinations(race, contestant):
    """32 combinations of 128 tokens: the rollout of one training step."""
    x = embeddings(32)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (torch.stack([torch.randperm(x.shape[0], generator=generator)[:128].sort().values for _ in range(32)]),)
        for _ in range(50)
    ]
    calls = {
        "ours": lambda i: ck.gather_tokens(x, i, dim=0),
        "x[index]": lambda i: x[i],
        "repeat, then gather": lambda i: x.repeat(32, 1, 1).gather(1, i[..., None].expand(-1, -1, SIZE)),
    }
    race("gather 32 combinations of 128", contestant, calls[contestant], inputs, {"repeat, then gather": 20})


@pytest.mark.parametrize("contestant", ["ours", "index_select"])
def bench_gather_gradient(race, contestant):
    x = embeddings(32).detach().clone().requires_grad_()
    grad = torch.randn(32, 128, SIZE).to(x.dtype)

    def ours(index: Tensor) -> Tensor:
        return torch.autograd.grad(ck.gather_tokens(x, index, dim=0), x, grad)[0]

    def torchs(index: Tensor) -> Tensor:
        return torch.autograd.grad(x.index_select(0, index.reshape(-1)), x, grad.view(-1, SIZE))[0]

    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randint(0, x.shape[0], (32, 128), generator=generator),) for _ in range(50)]
    call = {"ours": ours, "index_select": torchs}[contestant]
    race("gradient of 32 combinations of 128", contestant, call, inputs, {"index_select": 1})
