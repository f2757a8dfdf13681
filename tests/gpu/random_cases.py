"""Random cases of every op: odd shapes, ragged batches, ties, NaN, infinities, strides, every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import repack as repack_ops

from .problems import Problem, Tensors, fields

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ANY = [*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
ODD = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, 6e-8, 65504.0]


def seeded(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**60))


def scores(rng: Random, n: int, odd: bool = True) -> Tensor:
    """`[n]` scores of a random dtype: smooth, tied, or constant; some of them odd."""
    kind = rng.randrange(4)
    x = torch.randn(n, generator=seeded(rng)) * rng.choice([1e-3, 1.0, 30.0])
    x = [x, x.round(), torch.full((n,), rng.uniform(-1, 1)), x][kind]
    if odd and kind == 3 and n:
        for _ in range(rng.randint(1, 1 + n // 2)):
            x[rng.randrange(n)] = rng.choice(ODD)
    return x.to(rng.choice(FLOATS))


def laid_out(rng: Random, name: str, x: Tensor, inputs: Tensors) -> Callable[[Tensors], Tensor]:
    """Stores `[n]` values in `inputs` with gaps and an offset, and returns how to view them."""
    step, start = rng.choice([(1, 0), (1, 0), (1, 1), (1, 3), (2, 0), (3, 5)])
    base = torch.full((start + step * max(x.numel(), 1),), 7).to(x.dtype)
    base[start::step][: x.numel()] = x
    inputs[name] = base
    return lambda tensors: tensors[name][start::step][: x.numel()]


def select(rng: Random, most: int) -> Problem:
    grid = [(rng.randint(1, most), rng.randint(1, most), rng.randint(1, most)) for _ in range(rng.randint(1, 4))]
    inputs: Tensors = {}
    tokens = laid_out(rng, "tokens", scores(rng, sum(t * h * w for t, h, w in grid)), inputs)
    frames = laid_out(rng, "frames", scores(rng, sum(t for t, _, _ in grid)), inputs)
    with_frames = rng.random() < 0.7
    options = {
        "importance_ratio": rng.choice([0.0, 0.5, 1.0, rng.random()]),
        "mode": rng.choice(["official", "strict"]),
        "fill": rng.choice(["uniform", "none"]),
        "order": rng.choice(["index", "score"]),
    }
    if rng.random() < 0.6:
        options["keep_ratio"] = rng.choice([0.1, 0.25, 1.0, rng.uniform(0.001, 1.0)])
    else:
        options["num_tokens"] = [rng.randint(1, t * h * w) for t, h, w in grid]

    def run(x: Tensors) -> Tensors:
        kept = ck.select_tokens(tokens(x), frames(x) if with_frames else None, grid, **options)
        return fields(kept, "indices", "frame_counts", "status")

    return Problem("select", lambda seed: inputs, run)


def topk(rng: Random, most: int) -> Problem:
    lengths = [rng.choice([rng.randint(0, 20 * most), rng.randint(0, most)]) for _ in range(rng.randint(1, 5))]
    if most > 10 and rng.random() < 0.1:
        lengths[0] = rng.randint(5000, 40000)
    inputs: Tensors = {}
    values = laid_out(rng, "scores", scores(rng, sum(lengths)), inputs)
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    k = [rng.choice([0, n, rng.randint(0, n)]) for n in lengths]
    order = rng.choice(["index", "score"])

    def run(x: Tensors) -> Tensors:
        return {"indices": ck.segmented_topk(values(x), k, bounds, order=order)}

    return Problem("select", lambda seed: inputs, run)


def sample(rng: Random, most: int) -> Problem:
    rows, n = rng.randint(1, most), rng.randint(1, 20 * most)
    inputs: Tensors = {}
    values = laid_out(rng, "logits", scores(rng, rows * n), inputs)
    key = {"seed": rng.randrange(-(2**63), 2**64), "step": rng.randrange(2**32), "stream": rng.randrange(240)}
    k, samples = rng.randint(0, min(n, 40)), rng.randint(1, 4)

    def run(x: Tensors) -> Tensors:
        drawn = ck.gumbel_topk(values(x).unflatten(0, (rows, n)), k, num_samples=samples, **key)
        return fields(drawn, "indices", "log_prob", "status")

    return Problem("sample", lambda seed: inputs, run, frozenset({"log_prob"}))


def combinations(rng: Random, most: int) -> Problem:
    official = most > 10 and rng.random() < 0.3
    sizes = [(14, 14)] if official else [(rng.randint(1, most), rng.randint(1, most)) for _ in range(3)]
    grid = [(rng.randint(1, most), *rng.choice(sizes)) for _ in range(rng.randint(1, 3))]
    inputs: Tensors = {}
    tokens = laid_out(rng, "tokens", scores(rng, sum(t * h * w for t, h, w in grid)), inputs)
    frames = laid_out(rng, "frames", scores(rng, sum(t for t, _, _ in grid)), inputs)
    options = {
        "num_samples": rng.randint(1, 5),
        "num_frame_samples": rng.randint(0, 3),
        "keep_ratio": 0.02 if official else rng.uniform(0.02, 0.5),
        "group_size": 2.0 if official else rng.uniform(1.0, 4.0),
        "max_group_prob": 2.0,
        "frame_ratio": rng.uniform(0.05, 1.0),
        "mode": "official" if official else "strict",
        "seed": rng.randrange(-(2**63), 2**64),
        "step": rng.randrange(2**32),
    }
    names = ("indices", "groups", "frame_indices", "status", "log_prob", "frame_log_prob")

    def run(x: Tensors) -> Tensors:
        drawn = ck.sample_combinations(tokens(x), frames(x), grid, **options)
        return fields(drawn, *names)

    return Problem("combinations", lambda seed: inputs, run, frozenset({"log_prob", "frame_log_prob"}))


def _random_bits(rng: Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=seeded(rng), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


def _index(rng: Random, n: int) -> Tensor:
    """Any shape, repeated and missing rows, padding, and now and then what is out of range."""
    shape = [rng.randint(0, 6) for _ in range(rng.randint(1, 3))]
    low, high = (-3, n + 3) if rng.random() < 0.2 else (-1, n)
    index = torch.randint(low, high, shape, generator=seeded(rng))
    if low == -3 and index.numel():
        index.view(-1)[0] = rng.choice([2**62, -(2**62), 2**31, -(2**31) - 1])
    return index


def gather(rng: Random, most: int) -> Problem:
    n = rng.randint(1, 3 * most)
    inputs: Tensors = {"index": _index(rng, n)}
    if rng.random() < 0.3:
        inputs["index"] = inputs["index"].clamp(-(2**31), 2**31 - 1).int()
    dims, turned = {}, {}
    for name in "abc"[: rng.randint(1, 3)]:
        shape = [rng.randint(1, most) for _ in range(rng.randint(0, 3))]
        dims[name] = rng.randint(0, len(shape))
        shape.insert(dims[name], n)
        inputs[name] = _random_bits(rng, shape, rng.choice(ANY))
        turned[name] = rng.random() < 0.3  # its memory in another order
        if turned[name]:
            inputs[name] = inputs[name].transpose(0, -1).contiguous()

    def run(x: Tensors) -> Tensors:
        tensors = {name: x[name].transpose(0, -1) if turned[name] else x[name] for name in dims}
        return ck.gather_tokens(tensors, x["index"], dim=dims)

    return Problem("gather", lambda seed: inputs, run)


def gradient(rng: Random, most: int) -> Problem:
    n, dim = rng.randint(1, 2 * most), rng.randint(0, 1)
    index = _index(rng, n)
    shape = [rng.randint(1, most), rng.randint(1, most)]
    shape.insert(dim, n)
    x = torch.randn(shape, generator=seeded(rng)).to(rng.choice([*FLOATS, torch.float64]))
    grad = torch.randn([*shape[:dim], *index.shape, *shape[dim + 1 :]], generator=seeded(rng)).to(x.dtype)
    inputs = {"x": x, "index": index, "grad": grad}

    def run(x: Tensors) -> Tensors:
        source = x["x"].detach().requires_grad_()
        (found,) = torch.autograd.grad(ck.gather_tokens(source, x["index"], dim=dim), source, x["grad"])
        return {"gradient": found}

    return Problem("gather", lambda seed: inputs, run)


def _ascending(rng: Random, n: int, k: int, padding: int = 0) -> Tensor:
    kept = torch.tensor(sorted(rng.sample(range(n), k - padding)), dtype=torch.int64)
    return torch.nn.functional.pad(kept, (0, padding), value=-1)


def repack(rng: Random, most: int) -> Problem:
    """Into new memory, to the front of every head or of the tensor, ragged or not, with rope or without."""
    b, h, n, layers = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3 * most), rng.randint(1, 3)
    sizes = [rng.choice([1, 2, 3, 8, 16, 33, 64, 128]) for _ in range(2 * layers)]
    ragged, place = rng.random() < 0.3, rng.randrange(3)
    if ragged and place == repack_ops.IN_HEADS:
        place = repack_ops.IN_FRONT
    inputs: Tensors = {}
    if ragged:
        counts = [rng.randint(1, n), *(rng.randint(0, n) for _ in range(b * h - 1))]
        inputs["keep"] = torch.cat([_ascending(rng, n, k) for k in counts])
        inputs["bounds"] = torch.tensor([0, *counts]).cumsum(0).int()
        lead = [int(inputs["keep"].numel())]
    else:
        k = rng.randint(1, n)
        kb, kh = rng.choice([(1, 1), (b, 1), (b, h)])
        rows = [_ascending(rng, n, k, rng.choice([0, 0, rng.randint(0, k)])) for _ in range(kb * kh)]
        inputs["keep"] = torch.stack(rows).view(kb, kh, k)
        lead = [kb, kh, k]
    half = min(sizes) // 2
    rope = half > 0 and rng.random() < 0.4
    if rope:
        angle = torch.randn(*lead, half, generator=seeded(rng), dtype=torch.float64) * 100
        inputs["cos"], inputs["sin"] = angle.cos().float(), angle.sin().float()
    dtypes = FLOATS if rope else ANY
    for i, size in enumerate(sizes):
        dtype = rng.choice(dtypes)
        full = (
            torch.randn(b, h, n, size, generator=seeded(rng)).to(dtype)
            if rope
            else _random_bits(rng, [b, h, n, size], dtype)
        )
        inputs[f"x{i}"] = full
    lists = ([0] * len(sizes), rope, place, rng.random() < 0.5)

    def run(x: Tensors) -> Tensors:
        keep_of, turned, placement, zero_tail = lists
        cos, sin = ([x["cos"]], [x["sin"]]) if turned else ([], [])
        xs = [x[f"x{i}"].clone() for i in range(len(keep_of))]
        args = [x["keep"]], [x["bounds"]] if ragged else [], keep_of, cos, sin, [turned] * layers + [False] * layers
        if placement == 0:
            xs = repack_ops._repack_rows(xs, *args)
        else:
            repack_ops._repack_rows_(xs, *args, [placement] * len(xs), zero_tail)
        return {f"x{i}": found for i, found in enumerate(xs)}

    return Problem("repack", lambda seed: inputs, run)


# How many of the 10,000 cases each op gets.
RANDOM = {
    "select": (select, 2500),
    "topk": (topk, 1500),
    "sample": (sample, 1500),
    "combinations": (combinations, 1500),
    "gather": (gather, 1000),
    "gradient": (gradient, 500),
    "repack": (repack, 1500),
}
