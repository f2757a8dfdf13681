"""Calls whose kernels `aot.py` compiles: segments in registers, of every block size, and long rows."""

from __future__ import annotations

import torch

from cacovid_kernels.triton.topk import segmented_topk


def calls():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        frames = torch.zeros(32, 196, dtype=dtype)
        yield (
            f"32 frames of 196 {dtype}",
            lambda x=frames: segmented_topk(x, list(range(0, 6273, 196)), [50] * 32, False),
        )
        row = torch.zeros(150528, dtype=dtype)
        for ranked in (False, True):
            yield f"150528 {dtype}, ranked={ranked}", lambda x=row, r=ranked: segmented_topk(x, [0, 150528], [15052], r)
    for n in (9, 512, 1024, 2048, 4096):
        for ranked in (False, True):
            rows, bounds = torch.zeros(2, n), [0, n, 2 * n]
            yield f"rows of {n}, ranked={ranked}", lambda x=rows, b=bounds, r=ranked: segmented_topk(x, b, [5, 5], r)
    turned = torch.zeros(196, 2).t()
    yield "rows of a turned matrix", lambda: segmented_topk(turned, [0, 196, 392], [50, 50], False)
