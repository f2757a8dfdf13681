"""Attention of a few rows to a prompt of 32 frames of 196 tokens in a 7B-sized layer: 28 query heads, 4 of keys."""

from __future__ import annotations

import pytest
import torch
from baselines.attention import fewest_copies, softmax_of_products
from torch import Tensor

import cacovid_kernels as ck

KEYS = 6272


def problems(rows: int, heads: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(1, 28 // 4 * heads, rows, 128, generator=generator).to(dtype),
            torch.randn(1, heads, KEYS, 128, generator=generator).to(dtype),
        )
        for _ in range(3)
    ]


CONTESTANTS = {"ours": ck.attention_scores, "softmax of products": softmax_of_products, "fewest copies": fewest_copies}


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("contestant", CONTESTANTS)
def bench_attention(race, rows, dtype, contestant):
    inputs = problems(rows, 4, dtype)
    call = CONTESTANTS[contestant]
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(call(*inputs[0]), ck.attention_scores(*inputs[0]), rtol=tolerance, atol=1e-5)
    count = "1 row" if rows == 1 else f"{rows} rows"
    race(f"attention, {count}, {dtype}".replace("torch.", ""), contestant, call, inputs)
