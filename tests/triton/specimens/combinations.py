"""Calls whose kernels `aot.py` compiles: the published configuration in every dtype, frames of every block size."""

from __future__ import annotations

import torch

import cacovid_kernels as ck


def calls():
    yield "32 frames of 196", lambda: ck.sample_combinations(torch.zeros(32, 196), num_samples=23, **KEEP_2)
    for dtype, mode in ((torch.bfloat16, "strict"), (torch.float16, "official")):
        x, f = torch.zeros(32, 196, dtype=dtype), torch.zeros(32, dtype=dtype)
        options = {"num_samples": 23, "num_frame_samples": 23, "mode": mode, **KEEP_2}
        yield f"32 frames of 196, {mode}, {dtype}", lambda x=x, f=f, o=options: ck.sample_combinations(x, f, **o)
    for tokens in (64, 729, 2048):
        for keep in (0.02, 0.5):  # many groups, and one of all tokens
            x, options = torch.zeros(4, tokens), {"num_samples": 23, "keep_ratio": keep, "seed": 0}
            yield f"{tokens}, keep {keep}", lambda x=x, o=options: ck.sample_combinations(x, **o)
    x, f = torch.zeros(2048, 64), torch.zeros(2048)
    yield "2048 frames", lambda: ck.sample_combinations(x, f, num_samples=23, num_frame_samples=23, **KEEP_2)


KEEP_2 = {"keep_ratio": 0.02, "seed": 0}
