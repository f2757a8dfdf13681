"""Calls whose kernels `aot.py` compiles: Gumbel top-k of short and long rows, log-probabilities, derivatives."""

from __future__ import annotations

import torch

from cacovid_kernels.triton.sample import (
    gumbel_topk,
    pl_log_prob,
    pl_log_prob_backward,
    pl_log_prob_double_backward,
)


def calls():
    sizes = [(n, torch.float32) for n in (9, 196, 512, 1024, 2048, 4096)]
    for n, dtype in [*sizes, (196, torch.bfloat16), (196, torch.float16)]:
        rows = torch.zeros(2, n, dtype=dtype)
        yield f"16 draws from 2 rows of {n} {dtype}", lambda x=rows: gumbel_topk(x, 5, 16, 1, 2, None, 3)
    yield "4 draws from 150528", lambda: gumbel_topk(torch.zeros(1, 150528), 15052, 4, 1, 2, None, 3)
    step = torch.zeros((), dtype=torch.int64)
    yield "a step on the device", lambda: gumbel_topk(torch.zeros(2, 196), 5, 16, 1, 0, step, 3)
    yield "a step on the device, rows of 5000", lambda: gumbel_topk(torch.zeros(1, 5000), 5, 4, 1, 0, step, 3)
    cases = [(torch.float32, 30, 8), (torch.float32, 196, 50), (torch.float32, 512, 500), (torch.float32, 6272, 627)]
    for dtype, n, k in [*cases, (torch.float64, 196, 50), (torch.bfloat16, 196, 50), (torch.float16, 196, 50)]:
        logits, drawn, grad = torch.zeros(2, n, dtype=dtype), torch.zeros(4, 2, k, dtype=torch.int64), torch.zeros(4, 2)
        yield f"{k} of {n} {dtype}", lambda x=logits, i=drawn: pl_log_prob(x, i)
        yield f"gradient of {k} of {n} {dtype}", lambda x=logits, i=drawn, g=grad: pl_log_prob_backward(g, x, i)
        yield (
            f"second gradient of {k} of {n} {dtype}",
            lambda x=logits, i=drawn, g=grad: pl_log_prob_double_backward(x, g, x, i),
        )
