"""Calls of repack_paged_kv at the shape of a cache: 28 layers, 4 heads, 8 sequences of 6272 tokens, 10% kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from cacovid_kernels.triton.paged import repack_pages

N, K, L, H, SIZE, B = 6272, 627, 28, 4, 16, 8
M = N // SIZE
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def calls() -> Iterator[tuple[str, Callable]]:
    table, lens = torch.zeros(B, M, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    free = torch.zeros(B, -(-K // SIZE), dtype=torch.int32)
    keep, per_head = torch.zeros(1, 1, K, dtype=torch.int64), torch.zeros(B, H, K, dtype=torch.int64)

    def cache(layers: int, columns: int = 128, dtype: torch.dtype = torch.bfloat16, size: int = SIZE):
        return [torch.zeros(M, size, H, columns, dtype=dtype)] * (2 * layers)

    def run(xs: list[torch.Tensor], keep: list, angles: list, rotated: list[bool], where: torch.Tensor | None):
        keep_of = [*range(len(keep))] * (len(xs) // len(keep)) if len(keep) > 1 else [0] * len(xs)
        repack_pages(xs, table, lens, keep, keep_of, angles, angles, rotated, where)

    plain = [False] * (2 * L)
    for name, where in (("in place", None), ("to free blocks", free)):
        xs = cache(L)
        yield f"28 layers {name}", lambda xs=xs, w=where: run(xs, [keep], [], plain, w)
        yield (
            f"28 layers {name}, a list per layer and head",
            lambda xs=xs, w=where: run(xs, [per_head] * L, [], plain, w),
        )
        hnd = [torch.zeros(M, H, SIZE, 128, dtype=torch.bfloat16).transpose(1, 2)] * (2 * L)
        yield f"28 layers {name}, HND", lambda xs=hnd, w=where: run(xs, [keep], [], plain, w)
        for columns, dtype in [(80, torch.bfloat16), (100, torch.uint8), (33, torch.bfloat16), (576, torch.float32)]:
            pair = cache(1, columns, dtype)
            yield (
                f"{columns} columns of {dtype} {name}",
                lambda xs=pair, w=where: run(xs, [per_head], [], plain[:2], w),
            )
        apart = [torch.zeros(128, M, SIZE, H).permute(1, 2, 3, 0)] * 2
        yield f"columns apart {name}", lambda xs=apart, w=where: run(xs, [keep], [], plain[:2], w)
        for dtype, (columns, half) in product(FLOATS, [(128, 64), (128, 32), (37, 15), (576, 288)]):
            turned, angles = cache(L, columns, dtype), [torch.zeros(B, 1, K, half)]
            yield (
                f"{2 * half} of {columns} columns of {dtype} turned {name}",
                lambda xs=turned, a=angles, w=where: run(xs, [keep], a, [True] * L + [False] * L, w),
            )
