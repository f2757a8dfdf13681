"""Calls that launch every kernel of the score family, and every kind of tile."""

from __future__ import annotations

import torch

import cacovid_kernels as ck


def scores(rows: int, size: int, dtype: torch.dtype, grid: list[tuple[int, int, int]] | None = None):
    with torch.no_grad(), torch.device("meta"):
        token_head, frame_head = ck.PolicyHead(size).to(dtype), ck.PolicyHead(size).to(dtype)
    token_head, frame_head = token_head.to_empty(device="cpu"), frame_head.to_empty(device="cpu")

    def call():
        with torch.no_grad():
            hidden, weight = torch.empty(rows, size, dtype=dtype), torch.empty(size, dtype=dtype)
            ck.score_tokens(hidden, token_head, frame_head if grid else None, grid, norm_weight=weight)

    return call


def calls():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"32 frames of 196 x 3584 {name}", scores(6272, 3584, dtype, [(32, 14, 14)])
        yield f"4 frames of 25 x 896 {name}", scores(100, 896, dtype, [(4, 5, 5)])
        yield f"9 frames of 9 x 64 {name}", scores(81, 64, dtype, [(9, 3, 3)])
        yield f"18 rows of 16 {name}", scores(18, 16, dtype)
        yield f"8192 rows of 896 {name}", scores(8192, 896, dtype)
        yield f"8192 rows of 1100 {name}", scores(8192, 1100, dtype)
