"""Calls of gather_tokens and its adjoint at their real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import cacovid_kernels as ck
from cacovid_kernels.triton.gather import gather_rows, scatter_rows

N, K, HIDDEN = 6272, 627, 3584


def calls() -> Iterator[tuple[str, Callable]]:
    index, tokens = torch.zeros(K, dtype=torch.int64), torch.zeros(N, HIDDEN, dtype=torch.bfloat16)
    prompt = {
        "embeds": tokens,
        "position_ids": torch.zeros(3, 1, N, dtype=torch.int64),
        "mask": torch.ones(1, N, dtype=torch.bool),
        "labels": torch.zeros(1, N, dtype=torch.int64),
    }
    dims = {"embeds": 0, "position_ids": 2, "mask": 1, "labels": 1}
    yield "embeddings, positions, mask, labels", lambda: ck.gather_tokens(prompt, index, dim=dims)
    yield "embeddings", lambda: ck.gather_tokens(tokens, index)
    yield "32 combinations", lambda: ck.gather_tokens(tokens, index.expand(32, K))
    yield "batch of images, bytes", lambda: ck.gather_tokens(torch.zeros(4, N, 33, dtype=torch.uint8), index, dim=1)
    yield "transposed", lambda: ck.gather_tokens(tokens.float().t(), index, dim=1)
    yield "columns apart", lambda: ck.gather_tokens(torch.zeros(N, 128)[:, ::2], index)
    views = torch.zeros(2, 3, 5, N, 7, 8)[:, :, ::2, :, ::2]
    yield "four other axes", lambda: ck.gather_tokens(views, index, dim=3)
    yield "eight tensors", lambda: gather_rows([tokens[:, :1024].contiguous()] * 8, index, [0] * 8)
    grads = [torch.zeros(K, HIDDEN, dtype=d) for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    for grad in grads:
        yield f"sums of {grad.dtype}", lambda grad=grad: scatter_rows([grad], index, [N], [0])
        yield f"short sums of {grad.dtype}", lambda grad=grad: scatter_rows([grad[:, :5]], index, [N], [0])
    yield "eight sums", lambda: scatter_rows(grads * 2, index, [N] * 8, [0] * 8)
