"""Calls whose kernels `aot.py` compiles: Gumbel top-k in one launch and of long rows, log-probabilities, derivatives."""

from __future__ import annotations

import torch

from cacovid_kernels.triton.sample import (
    gumbel_topk,
    pl_log_prob,
    pl_log_prob_backward,
    pl_log_prob_double_backward,
)


def calls():
    for n in (9, 196, 512, 1024, 2048, 4096):
        yield f"16 draws from 2 rows of {n}", lambda x=torch.zeros(2, n): gumbel_topk(x, 5, 16, 1, 2, 3)
    for dtype in (torch.bfloat16, torch.float16):
        yield (
            f"16 draws from 2 rows of 196 {dtype}",
            lambda x=torch.zeros(2, 196, dtype=dtype): gumbel_topk(x, 5, 16, 1, 2, 3),
        )
    yield "4 draws from 150528", lambda: gumbel_topk(torch.zeros(1, 150528), 15052, 4, 1, 2, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for n, k in ((30, 8), (196, 50), (6272, 627)):
            logits, drawn = torch.zeros(2, n, dtype=dtype), torch.zeros(4, 2, k, dtype=torch.int64)
            grad = torch.zeros(4, 2)
            yield f"{k} of {n} {dtype}", lambda x=logits, i=drawn: pl_log_prob(x, i)
            yield f"gradient of {k} of {n} {dtype}", lambda x=logits, i=drawn, g=grad: pl_log_prob_backward(g, x, i)
            yield (
                f"second gradient of {k} of {n} {dtype}",
                lambda x=logits, i=drawn, g=grad: pl_log_prob_double_backward(x, g, x, i),
            )
