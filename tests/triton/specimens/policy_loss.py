"""Calls whose kernels `aot.py` compiles: packing, sums, the loss of every kind of logits."""

from __future__ import annotations

import torch

from cacovid_kernels.triton.policy_loss import pack_indices, pack_masks, policy_loss, policy_sums


def calls():
    for dtype in (torch.bool, torch.int32, torch.int64):
        yield f"115 masks of 6272 {dtype}", lambda d=dtype: pack_masks(torch.zeros(115, 6272, dtype=d))
    yield "115 lists of 627 positions", lambda: pack_indices(torch.zeros(115, 627, dtype=torch.int64), 6272)
    for dtype, n in [(torch.float32, 6272), (torch.float32, 32), (torch.float64, 6272), (torch.bfloat16, 150528)]:
        words, rewards = torch.zeros(2, 115, -(-n // 32), dtype=torch.int32), torch.zeros(2, 115, dtype=dtype)
        yield f"sums over {n} tokens, {dtype}", lambda w=words, r=rewards, n=n: policy_sums(w, r, n, True)
    yield "sums that are not balanced", lambda: policy_sums(words[:, :, :1], rewards, 32, False)
    sums = torch.zeros(2, 6, 6272, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((2, 6272), (2, 6272, 2)):
            x = torch.zeros(shape, dtype=dtype)
            for kl in (0.0, 0.1):
                yield (
                    f"loss of {list(shape)} {dtype}, kl_weight {kl}",
                    lambda x=x, kl=kl: policy_loss(x, x, sums, 0.2, 0.28, kl),
                )
