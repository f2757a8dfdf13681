"""Repacking a 7B-sized paged cache: 28 layers, 4 sequences of 1568 tokens in blocks of 16, 4 heads of 128, bfloat16."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from baselines import paged
from torch import Tensor

import cacovid_kernels as ck

LAYERS, SEQUENCES, TOKENS, BLOCK, HEADS, SIZE = 28, 4, 1568, 16, 4, 128
PER_SEQUENCE = TOKENS // BLOCK
TABLE = torch.randperm(SEQUENCES * PER_SEQUENCE, generator=torch.Generator().manual_seed(0)).view(SEQUENCES, -1)
LENGTHS = torch.full((SEQUENCES,), TOKENS)


@lru_cache(maxsize=1)
def cache() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES * PER_SEQUENCE, BLOCK, HEADS, SIZE)
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2 * LAYERS)]
    return tensors[:LAYERS], tensors[LAYERS:]


def inputs_of(percent: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(percent)
    count = TOKENS * percent // 100
    return [(torch.randperm(TOKENS, generator=generator)[:count].sort().values,) for _ in range(50)]


@pytest.mark.parametrize("percent", [10, 25])
@pytest.mark.parametrize(
    "contestant",
    ["ours", "index_select, index_copy_", "x[slots] = x[slots]", "x[blocks, slots] = x[blocks, slots]"],
)
def bench_repack_pages_in_place(race, percent, contestant):
    keys, values = cache()
    calls = {
        "ours": lambda i: ck.repack_paged_kv((keys, values), TABLE, LENGTHS, i),
        **paged.baselines([*keys, *values], TABLE),
    }
    race(f"repack {percent}% of pages in place", contestant, calls[contestant], inputs_of(percent))
