"""Calls whose kernels `aot.py` compiles: the published configuration, every dtype, and frames of every block size."""

from __future__ import annotations

import torch

import cacovid_kernels as ck


def calls():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(32, 196, dtype=dtype)
        yield (
            f"32 frames of 196 {dtype}",
            lambda x=x: ck.sample_combinations(x, num_samples=23, keep_ratio=0.02, seed=0),
        )
    for mode in ("strict", "official"):
        for frames in (32, 128):
            x, f = torch.zeros(frames, 196), torch.zeros(frames)
            options = {"num_samples": 23, "keep_ratio": 0.02, "num_frame_samples": 23, "seed": 0, "mode": mode}
            yield (
                f"{frames} frames of 196, {mode} frames",
                lambda x=x, f=f, o=options: ck.sample_combinations(x, f, **o),
            )
    turned = torch.zeros(196, 32).t()
    yield "196 turned", lambda: ck.sample_combinations(turned, num_samples=23, keep_ratio=0.02, seed=0)
    for tokens in (64, 729, 1600, 2304, 4096):
        x = torch.zeros(4, tokens)
        for keep in (0.02, 0.5):
            yield (
                f"{tokens}, keep {keep}",
                lambda x=x, k=keep: ck.sample_combinations(x, num_samples=23, keep_ratio=k, seed=0),
            )
    x, f = torch.zeros(4096, 64), torch.zeros(4096)
    yield (
        "4096 frames",
        lambda: ck.sample_combinations(x, f, num_samples=23, keep_ratio=0.05, num_frame_samples=23, seed=0),
    )
