"""Repacking a 7B-sized cache: 28 layers, 4 key and value heads of 128, 6272 tokens, bfloat16."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from baselines import repack
from torch import Tensor

import cacovid_kernels as ck

LAYERS, HEADS, TOKENS, SIZE = 28, 4, 6272, 128
INV_FREQ = 1e6 ** (-torch.arange(0, SIZE, 2) / SIZE)


@lru_cache(maxsize=1)
def cache() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, TOKENS, SIZE)
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2 * LAYERS)]
    return tensors[:LAYERS], tensors[LAYERS:]


def inputs_of(percent: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(percent)
    count = TOKENS * percent // 100
    return [(torch.randperm(TOKENS, generator=generator)[:count].sort().values,) for _ in range(50)]


def baselines(percent: int) -> dict:
    keys, values = cache()
    return repack.baselines([*keys, *values], TOKENS * percent // 100)


@pytest.mark.parametrize("percent", [10, 25])
@pytest.mark.parametrize("contestant", ["ours", "index_select(out=)", "index_select(out=), flat", "x[:, :, idx]"])
def bench_repack_in_place(race, percent, contestant):
    keys, values = cache()
    calls = {"ours": lambda i: ck.repack_kv((keys, values), i, inplace=True), **baselines(percent)}
    targets = {"index_select(out=)": 1.3, "x[:, :, idx]": 5}
    race(f"repack {percent}% in place", contestant, calls[contestant], inputs_of(percent), targets)


@pytest.mark.parametrize("percent", [10, 25])
@pytest.mark.parametrize("contestant", ["ours", "index_select", "x[:, :, idx]", "gather, expanded index"])
def bench_repack_to_new_memory(race, percent, contestant):
    keys, values = cache()
    calls = {"ours": lambda i: ck.repack_kv((keys, values), i), **baselines(percent)}
    race(f"repack {percent}%, new memory", contestant, calls[contestant], inputs_of(percent), {"x[:, :, idx]": 5})


@pytest.mark.parametrize("contestant", ["ours", "torch"])
def bench_repack_with_new_positions(race, contestant):
    keys, values = cache()
    rope = ck.Rope(INV_FREQ)

    def torchs(i: Tensor) -> list[Tensor]:
        angle = (torch.arange(i.numel()) - i)[:, None] * INV_FREQ
        cos, sin = angle.cos().repeat(1, 2).to(torch.bfloat16), angle.sin().repeat(1, 2).to(torch.bfloat16)
        turned = []
        for x in keys:
            x = x[:, :, i]
            half = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
            turned.append(x * cos + half * sin)
        return turned + [x[:, :, i] for x in values]

    call = {"ours": lambda i: ck.repack_kv((keys, values), i, rope=rope), "torch": torchs}[contestant]
    race("repack 10%, new positions", contestant, call, inputs_of(10))
