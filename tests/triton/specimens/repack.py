"""Calls of repack_kv at the shape of a cache: 28 layers, 4 heads, 6272 tokens, 10% kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

from cacovid_kernels.triton.repack import repack_rows, repack_rows_

N, K, L, H = 6272, 627, 28, 4
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def cache(layers: int, columns: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    x = torch.zeros(1, H, N, columns, dtype=dtype)
    return [x] * (2 * layers)


def calls() -> Iterator[tuple[str, Callable]]:
    keep, per_head = torch.zeros(1, 1, K, dtype=torch.int64), torch.zeros(1, H, K, dtype=torch.int64)
    flat, bounds = torch.zeros(H * K, dtype=torch.int64), torch.zeros(H + 1, dtype=torch.int32)
    xs = cache(L)
    shared = ([0] * 2 * L, [], [], [False] * 2 * L)
    own = ([*range(L)] * 2, [], [], [False] * 2 * L)
    yield "28 layers", lambda: repack_rows(xs, [keep], [], *shared)
    yield "28 layers, a list per layer and head", lambda: repack_rows(xs, [per_head] * L, [], *own)
    yield "28 layers, ragged", lambda: repack_rows(xs, [flat] * L, [bounds] * L, *own)
    yield "28 layers in their heads", lambda: repack_rows_(xs, [keep], [], *shared, [1] * 2 * L, False)
    yield "28 layers in their heads, zeros behind", lambda: repack_rows_(xs, [keep], [], *shared, [1] * 2 * L, True)
    yield "28 layers to the front", lambda: repack_rows_(xs, [keep], [], *shared, [2] * 2 * L, False)
    yield "28 layers to the front, ragged", lambda: repack_rows_(xs, [flat] * L, [bounds] * L, *own, [2] * 2 * L, False)
    for columns, dtype in [(80, torch.bfloat16), (100, torch.uint8), (33, torch.bfloat16), (576, torch.float32)]:
        pair = cache(1, columns, dtype)
        one = ([0, 0], [], [], [False] * 2)
        yield f"{columns} columns of {dtype}", lambda pair=pair, one=one: repack_rows(pair, [keep], [], *one)
        yield (
            f"{columns} columns of {dtype} in place",
            lambda pair=pair, one=one: repack_rows_(pair, [keep], [], *one, [1, 1], True),
        )
    apart = [torch.zeros(128, 1, H, N).permute(1, 2, 3, 0)] * 2
    yield "columns apart", lambda: repack_rows(apart, [keep], [], [0, 0], [], [], [False] * 2)
    yield "columns apart in place", lambda: repack_rows_(apart, [keep], [], [0, 0], [], [], [False] * 2, [1, 1], True)
    for dtype, (columns, half) in product(FLOATS, [(128, 64), (128, 32), (37, 15)]):
        xs_turned = cache(L, columns, dtype)
        table = torch.zeros(1, 1, K, half)
        turned = ([0] * 2 * L, [table], [table], [True] * L + [False] * L)
        name = f"{dtype}, {2 * half} of {columns} columns turned"
        yield name, lambda xs=xs_turned, turned=turned: repack_rows(xs, [keep], [], *turned)
        yield (
            f"{name} in place",
            lambda xs=xs_turned, turned=turned: repack_rows_(xs, [keep], [], *turned, [1] * 2 * L, True),
        )
        tables = [torch.zeros(H * K, half)]
        ragged = ([0] * 2 * L, tables, tables, [True] * L + [False] * L)
        yield f"{name}, ragged", lambda xs=xs_turned, r=ragged: repack_rows(xs, [flat], [bounds], *r)
