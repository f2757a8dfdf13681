"""Calls of the select family whose kernels are compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import cacovid_kernels as ck


def calls() -> Iterator[tuple[str, Callable]]:
    for frames in (32, 200, 768, 2048):
        tokens, importance = torch.empty(frames, 196), torch.empty(frames)
        yield f"{frames} frames of 196 float32", lambda t=tokens, f=importance: ck.select_tokens(t, f, keep_ratio=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        tokens = torch.empty(2, 32, 196, dtype=dtype)
        yield f"2 x 32 frames of 196 {dtype}", lambda t=tokens: ck.select_tokens(t, t[..., 0], keep_ratio=0.1)
    for size in (16, 1024, 4096):
        tokens = torch.empty(8, size)
        yield f"8 frames of {size}", lambda t=tokens: ck.select_tokens(t, t[:, 0], keep_ratio=0.1)
    for frames, size in ((200, 500), (2048, 4096)):
        tokens = torch.empty(1, dtype=torch.float16).expand(frames, size)
        yield (
            f"{frames} frames of {size}, strict, by score",
            lambda t=tokens: ck.select_tokens(t, t[:, 0], keep_ratio=0.1, mode="strict", order="score"),
        )
    tokens = torch.empty(32, 196)
    yield "strict", lambda t=tokens: ck.select_tokens(t, t[:, 0], keep_ratio=0.1, mode="strict")
    yield "strict, by score", lambda t=tokens: ck.select_tokens(t, None, keep_ratio=0.1, mode="strict", order="score")
    turned = torch.empty(196, 32).t()
    yield "32 strided frames", lambda t=turned: ck.select_tokens(t, t[:, 0], keep_ratio=0.1)
    tokens = torch.empty(4096, 196, dtype=torch.bfloat16)
    yield "4096 frames of 196", lambda t=tokens: ck.select_tokens(t, t[:, 0], keep_ratio=0.1)
    tokens = torch.empty(1, 2**20, dtype=torch.bfloat16)
    for mode, order in (("official", "index"), ("strict", "score")):
        yield (
            f"1 frame of 2^20, {mode}, by {order}",
            lambda t=tokens, m=mode, o=order: ck.select_tokens(t, t[:, 0], keep_ratio=0.1, mode=m, order=o),
        )
    for frames in (32, 100_000):
        scores = torch.empty(frames)
        yield (
            f"budget of {frames} frames",
            lambda f=scores, n=frames: ck.allocate_budget(f, [(n, 14, 14)], keep_ratio=0.1),
        )
