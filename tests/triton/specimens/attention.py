"""Calls whose kernels `aot.py` compiles: one row and many, every dtype, causal or not, padded or not."""

from __future__ import annotations

import torch

from cacovid_kernels.triton.attention import attention_scores


def calls():
    def call(dtype, rows, keys, size=128, heads=28, padded=False, per_head=False):
        query, cache = torch.zeros(1, heads, rows, size, dtype=dtype), torch.zeros(1, 4, keys, size, dtype=dtype)
        mask = torch.ones(1, keys, dtype=torch.bool) if padded else None
        positions = torch.zeros(1, rows, dtype=torch.int64) if padded else None
        return lambda: attention_scores(query, cache, mask, positions, size**-0.5, per_head)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"1 row, 6272 keys of 4 heads, {dtype}", call(dtype, 1, 6272)
        yield f"32 rows in a padded batch, {dtype}", call(dtype, 32, 6272, padded=True)
        yield f"32 rows per head, {dtype}", call(dtype, 32, 6272, padded=True, per_head=True)
    yield "heads of 80 columns", call(torch.bfloat16, 4, 1000, size=80)
    yield "heads of 256 columns, 200,000 keys", call(torch.bfloat16, 32, 200_000, size=256, heads=8)
