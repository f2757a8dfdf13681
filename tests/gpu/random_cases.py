"""Random cases of every op: odd shapes, ragged batches, ties, NaN, infinities, strides, every dtype.

Every kernel is compiled anew for each dtype, bucket of sizes and alignment, which takes a second or several. So the
structures of the cases come from a pool, as large as an op's compile time allows, and the values differ in each case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from paged_cases import random_call
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import paged as paged_ops
from cacovid_kernels.ops import repack as repack_ops

from .problems import SCALE, Problem, Tensors, fields

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ANY = [*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
ODD = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, 6e-8, 65504.0]


class Dice(NamedTuple):
    """What shapes and options are drawn from, and what values are."""

    structure: Random
    values: Random

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.values.randrange(2**60))


def scores(dice: Dice, n: int) -> Tensor:
    """`[n]` scores of a random dtype: smooth, tied, or constant; some of them odd."""
    kind = dice.values.randrange(4)
    x = torch.randn(n, generator=dice.generator()) * dice.values.choice([1e-3, 1.0, 30.0])
    x = [x, x.round(), torch.full((n,), dice.values.uniform(-1, 1)), x][kind]
    if kind == 3 and n:
        for _ in range(dice.values.randint(1, 1 + n // 2)):
            x[dice.values.randrange(n)] = dice.values.choice(ODD)
    return x.to(dice.structure.choice(FLOATS))


def laid_out(dice: Dice, name: str, x: Tensor, inputs: Tensors) -> Callable[[Tensors], Tensor]:
    """Stores `[n]` values in `inputs` with gaps and an offset, and returns how to view them."""
    step, start = dice.structure.choice([(1, 0), (1, 0), (1, 1), (1, 3), (2, 0), (3, 5)])
    base = torch.full((start + step * max(x.numel(), 1),), 7).to(x.dtype)
    base[start::step][: x.numel()] = x
    inputs[name] = base
    return lambda tensors: tensors[name][start::step][: x.numel()]


def step_of(dice: Dice, inputs: Tensors) -> Callable[[Tensors], int | Tensor]:
    """A step known to the host, or a tensor, which may pass 2^32."""
    if dice.structure.random() < 0.5:
        step = dice.values.randrange(2**32)
        return lambda tensors: step
    inputs["step"] = torch.tensor(dice.values.randrange(2**33))
    return lambda tensors: tensors["step"]


def select(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    grid = [(rng.randint(1, most), rng.randint(1, most), rng.randint(1, most)) for _ in range(rng.randint(1, 4))]
    inputs: Tensors = {}
    tokens = laid_out(dice, "tokens", scores(dice, sum(t * h * w for t, h, w in grid)), inputs)
    frames = laid_out(dice, "frames", scores(dice, sum(t for t, _, _ in grid)), inputs)
    with_frames = rng.random() < 0.7
    options = {
        "importance_ratio": dice.values.choice([0.0, 0.5, 1.0, dice.values.random()]),
        "mode": rng.choice(["official", "strict"]),
        "fill": rng.choice(["uniform", "none"]),
        "order": rng.choice(["index", "score"]),
    }
    if rng.random() < 0.6:
        options["keep_ratio"] = dice.values.choice([0.1, 0.25, 1.0, dice.values.uniform(0.001, 1.0)])
    else:
        options["num_tokens"] = [dice.values.randint(1, t * h * w) for t, h, w in grid]

    together = rng.random() < 0.4  # with the layout, and the rows of the kept tokens
    if together and rng.random() < 0.7:
        inputs["rows"] = _random_bits(dice, [sum(t * h * w for t, h, w in grid), rng.randint(1, 40)], rng.choice(ANY))

    def run(x: Tensors) -> Tensors:
        options["tokens"] = x.get("rows")
        kept = ck.select_tokens(tokens(x), frames(x) if with_frames else None, grid, layout=together, **options)
        found = fields(kept, "indices", "frame_counts", "frame_status", "status", "cu_seqlens")
        found |= {"mask": kept.mask(), "positions": kept.positions()}
        return found if kept.tokens is None else found | {"rows": kept.tokens}

    return Problem("select", lambda seed: inputs, run)


def topk(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    lengths = [rng.choice([rng.randint(0, 20 * most), rng.randint(0, most)]) for _ in range(rng.randint(1, 5))]
    if most > 10 and rng.random() < 0.1:
        lengths[0] = rng.randint(5000, 40000)
    inputs: Tensors = {}
    values = laid_out(dice, "scores", scores(dice, sum(lengths)), inputs)
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    k = [dice.values.choice([0, n, dice.values.randint(0, n)]) for n in lengths]
    order = rng.choice(["index", "score"])

    def run(x: Tensors) -> Tensors:
        return {"indices": ck.segmented_topk(values(x), k, bounds, order=order)}

    return Problem("select", lambda seed: inputs, run)


def sample(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    rows, n = rng.randint(1, most), rng.randint(1, 20 * most)
    inputs: Tensors = {}
    values = laid_out(dice, "logits", scores(dice, rows * n), inputs)
    draw = dice.values
    key = {"seed": draw.randrange(-(2**63), 2**64), "stream": draw.randrange(240)}
    step = step_of(dice, inputs)
    k, samples = rng.randint(0, min(n, 40)), rng.randint(1, 4)

    def run(x: Tensors) -> Tensors:
        drawn = ck.gumbel_topk(values(x).unflatten(0, (rows, n)), k, num_samples=samples, step=step(x), **key)
        return fields(drawn, "indices", "log_prob", "status")

    return Problem("sample", lambda seed: inputs, run, frozenset({"log_prob"}))


def combinations(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    official = most > 10 and rng.random() < 0.3
    sizes = [(14, 14)] if official else [(rng.randint(1, most), rng.randint(1, most)) for _ in range(2)]
    grid = [(rng.randint(1, most), *rng.choice(sizes)) for _ in range(rng.randint(1, 2))]
    inputs: Tensors = {}
    tokens = laid_out(dice, "tokens", scores(dice, sum(t * h * w for t, h, w in grid)), inputs)
    frames = laid_out(dice, "frames", scores(dice, sum(t for t, _, _ in grid)), inputs)
    options = {
        "num_samples": rng.randint(1, 5),
        "num_frame_samples": rng.randint(0, 3),
        "keep_ratio": 0.02 if official else rng.uniform(0.02, 0.5),
        "group_size": 2.0 if official else rng.uniform(1.0, 4.0),
        "max_group_prob": 2.0,
        "frame_ratio": dice.values.uniform(0.05, 1.0),
        "mode": "official" if official else "strict",
        "seed": dice.values.randrange(-(2**63), 2**64),
    }
    step = step_of(dice, inputs)
    names = ("indices", "groups", "frame_indices", "frame_status", "status", "log_prob", "frame_log_prob")

    def run(x: Tensors) -> Tensors:
        drawn = ck.sample_combinations(tokens(x), frames(x), grid, step=step(x), **options)
        return fields(drawn, *names)

    return Problem("combinations", lambda seed: inputs, run, frozenset({"log_prob", "frame_log_prob"}))


def policy_loss(dice: Dice, most: int) -> Problem:
    """Masks of any kind, or positions; some rewards and logits odd."""
    rng = dice.structure
    b, g, n = rng.randint(1, 3), rng.randint(1, 3 * most), rng.randint(1, 20 * most)
    inputs: Tensors = {}
    rewards = laid_out(dice, "rewards", scores(dice, b * g), inputs)
    shape = (b, n, 2) if rng.random() < 0.5 else (b, n)
    logits = laid_out(dice, "logits", scores(dice, math.prod(shape)), inputs)
    old = laid_out(dice, "old", scores(dice, math.prod(shape)), inputs)
    positions = rng.random() < 0.3
    if positions:
        inputs["masks"] = torch.randint(-3, n + 3, (b, g, rng.randint(0, 2 * most)), generator=dice.generator())
    else:
        kind = rng.choice([dtype for dtype in ANY if not dtype.is_floating_point])
        inputs["masks"] = (torch.rand(b, g, n, generator=dice.generator()) < dice.values.random()).to(kind)
    options = {
        "kl_weight": rng.choice([0.0, 0.1]),
        "eps_low": dice.values.choice([0.0, 0.2]),
        "eps_high": dice.values.choice([0.0, 0.28]),
    }
    balanced = rng.random() < 0.5

    def run(x: Tensors) -> Tensors:
        given = x["masks"]
        words = ck.pack_masks(indices=given, num_tokens=n) if positions else ck.pack_masks(given)
        sums = ck.combination_sums(words, rewards(x).unflatten(0, (b, g)), num_tokens=n, balanced=balanced)
        now = logits(x).unflatten(0, shape).detach().requires_grad_()
        loss = sums.loss(now, old(x).unflatten(0, shape), **options)
        (gradient,) = torch.autograd.grad(loss, now)
        # A NaN has no bits to compare.
        found = {"sums": sums.values, "gradient": gradient}
        return {"words": words, "loss": loss.detach(), **{key: y.nan_to_num(7.0) for key, y in found.items()}}

    return Problem("policy_loss", lambda seed: inputs, run, frozenset({"loss"}))


def _random_bits(dice: Dice, shape: list[int], dtype: torch.dtype) -> Tensor:
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=dice.generator(), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


def _index(dice: Dice, n: int) -> Tensor:
    """Any shape, repeated and missing rows, padding, and now and then what is out of range."""
    shape = [dice.structure.randint(0, 6) for _ in range(dice.structure.randint(1, 3))]
    low, high = (-3, n + 3) if dice.values.random() < 0.2 else (-1, n)
    index = torch.randint(low, high, shape, generator=dice.generator())
    if low == -3 and index.numel():
        index.view(-1)[0] = dice.values.choice([2**62, -(2**62), 2**31, -(2**31) - 1])
    return index


def gather(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    n = rng.randint(1, 3 * most)
    inputs: Tensors = {"index": _index(dice, n)}
    if rng.random() < 0.3:
        inputs["index"] = inputs["index"].clamp(-(2**31), 2**31 - 1).int()
    dims, turned = {}, {}
    for name in "abc"[: rng.randint(1, 3)]:
        shape = [rng.randint(1, most) for _ in range(rng.randint(0, 3))]
        dims[name] = rng.randint(0, len(shape))
        shape.insert(dims[name], n)
        inputs[name] = _random_bits(dice, shape, rng.choice(ANY))
        turned[name] = rng.random() < 0.3  # its memory in another order
        if turned[name]:
            inputs[name] = inputs[name].transpose(0, -1).contiguous()

    def run(x: Tensors) -> Tensors:
        tensors = {name: x[name].transpose(0, -1) if turned[name] else x[name] for name in dims}
        return ck.gather_tokens(tensors, x["index"], dim=dims)

    return Problem("gather", lambda seed: inputs, run)


def gradient(dice: Dice, most: int) -> Problem:
    rng = dice.structure
    n, dim = rng.randint(1, 2 * most), rng.randint(0, 1)
    index = _index(dice, n)
    shape = [rng.randint(1, most), rng.randint(1, most)]
    shape.insert(dim, n)
    x = torch.randn(shape, generator=dice.generator()).to(rng.choice([*FLOATS, torch.float64]))
    grad = torch.randn([*shape[:dim], *index.shape, *shape[dim + 1 :]], generator=dice.generator()).to(x.dtype)
    inputs = {"x": x, "index": index, "grad": grad}

    def run(x: Tensors) -> Tensors:
        source = x["x"].detach().requires_grad_()
        (found,) = torch.autograd.grad(ck.gather_tokens(source, x["index"], dim=dim), source, x["grad"])
        return {"gradient": found}

    return Problem("gather", lambda seed: inputs, run)


def _ascending(rng: Random, n: int, k: int, padding: int = 0) -> Tensor:
    kept = torch.tensor(sorted(rng.sample(range(n), k - padding)), dtype=torch.int64)
    return torch.nn.functional.pad(kept, (0, padding), value=-1)


def repack(dice: Dice, most: int, in_place: bool = False) -> Problem:
    """Into new memory, to the front of every head or of the tensor, ragged or not, with rope or without."""
    rng, values = dice.structure, dice.values
    b, h, n, layers = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3 * most), rng.randint(1, 3)
    sizes = [rng.choice([1, 2, 3, 8, 16, 33, 64, 128]) for _ in range(2 * layers)]
    ragged, place = rng.random() < 0.3, rng.randrange(3)
    if in_place and place == 0:
        place = repack_ops.IN_FRONT
    if ragged and place == repack_ops.IN_HEADS:
        place = repack_ops.IN_FRONT
    inputs: Tensors = {}
    if ragged:
        counts = [values.randint(1, n), *(values.randint(0, n) for _ in range(b * h - 1))]
        inputs["keep"] = torch.cat([_ascending(values, n, k) for k in counts])
        inputs["bounds"] = torch.tensor([0, *counts]).cumsum(0).int()
        lead = [int(inputs["keep"].numel())]
    else:
        k = rng.randint(1, n)
        kb, kh = rng.choice([(1, 1), (b, 1), (b, h)])
        rows = [_ascending(values, n, k, values.choice([0, 0, values.randint(0, k)])) for _ in range(kb * kh)]
        inputs["keep"] = torch.stack(rows).view(kb, kh, k)
        lead = [kb, kh, k]
    half = min(sizes) // 2
    rope = half > 0 and rng.random() < 0.4
    if rope:
        angle = torch.randn(*lead, half, generator=dice.generator(), dtype=torch.float64) * 100
        inputs["cos"], inputs["sin"] = angle.cos().float(), angle.sin().float()
    for i, size in enumerate(sizes):
        shape, dtype = [b, h, n, size], rng.choice(FLOATS if rope else ANY)
        random = torch.randn(shape, generator=dice.generator()).to(dtype) if rope else _random_bits(dice, shape, dtype)
        inputs[f"x{i}"] = random
    zero_tail = rng.random() < 0.5

    def run(x: Tensors) -> Tensors:
        cos, sin = ([x["cos"]], [x["sin"]]) if rope else ([], [])
        xs = [x[f"x{i}"].clone() for i in range(2 * layers)]
        bounds = [x["bounds"]] if ragged else []
        args = [x["keep"]], bounds, [0] * len(xs), cos, sin, [rope] * layers + [False] * layers
        if place == 0:
            xs = repack_ops._repack_rows(xs, *args)
        else:
            repack_ops._repack_rows_(xs, *args, [place] * len(xs), zero_tail)
        return {f"x{i}": found for i, found in enumerate(xs)}

    return Problem("repack", lambda seed: inputs, run)


def paged(dice: Dice, most: int, in_place: bool = False) -> Problem:
    """In place or to free blocks, in every layout, turned or not, with ids and positions out of range or not."""
    hostile, in_place = dice.structure.random() < 0.3, dice.structure.random() < 0.6 or in_place
    call = random_call(dice.structure, hostile, in_place, most, dice.values)
    inputs = {f"x{i}": base for i, base in enumerate(call.bases)}
    inputs |= {"table": call.block_table, "lens": call.seq_lens}
    inputs |= {"free": call.out_block_table} if call.out_block_table is not None else {}
    for name, lists in (("keep", call.keep), ("cos", call.cos), ("sin", call.sin)):
        inputs |= {f"{name}{i}": x for i, x in enumerate(lists)}
    views = [(x.shape, x.stride(), x.storage_offset()) for x in call.pages]

    def run(x: Tensors) -> Tensors:
        bases = [x[f"x{i}"].clone() for i in range(len(views))]
        pages = [base.as_strided(*view) for base, view in zip(bases, views, strict=True)]
        keep, cos, sin = ([x[f"{name}{i}"] for i in range(len(call.keep)) if f"{name}{i}" in x]
                          for name in ("keep", "cos", "sin"))  # fmt: skip
        tables = paged_ops._repack_pages(
            pages, x["table"], x["lens"], keep, call.keep_of, cos, sin, call.rotated, x.get("free")
        )
        names = ("block_table", "seq_lens", "freed_blocks", "num_freed", "status")
        return {f"x{i}": base for i, base in enumerate(bases)} | dict(zip(names, tables, strict=True))

    return Problem("paged", lambda seed: inputs, run)


def attention(dice: Dice, most: int) -> Problem:
    """Rows that see all, some or none of the keys; products of 0, tied or huge, some NaN or infinite."""
    rng = dice.structure
    b, k, group, d = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 5), rng.choice([1, 16, 40, 128, 200])
    r, n = rng.randint(0, most), rng.randint(0, 20 * most)
    query = scores(dice, b * k * group * r * d).view(b, k * group, r, d)
    if SCALE == "dry" and query.dtype == torch.bfloat16:  # Triton's interpreter multiplies it wrongly
        query = query.float()
    keys = torch.randn(b, k, d, n, generator=dice.generator()).transpose(2, 3) / math.sqrt(d)
    inputs: Tensors = {"query": query, "keys": keys.to(query.dtype)}
    if rng.random() < 0.5:
        inputs["mask"] = torch.rand(b, n, generator=dice.generator()) < dice.values.random()
    if rng.random() < 0.5:
        inputs["positions"] = torch.randint(-2, n + 2, (b, r), generator=dice.generator())
    per_head = rng.random() < 0.3

    def run(x: Tensors) -> Tensors:
        found = ck.attention_scores(
            x["query"], x["keys"], mask=x.get("mask"), row_positions=x.get("positions"), scale=1.0, per_head=per_head
        )
        return {"scores": found}

    return Problem("attention", lambda seed: inputs, run, frozenset({"scores"}))


class Family(NamedTuple):
    make: Callable[[Dice, int], Problem]
    cases: int
    structures: int


# 12,000 cases in all.
RANDOM = {
    "select": Family(select, 2000, 200),
    "topk": Family(topk, 1500, 150),
    "sample": Family(sample, 1500, 60),
    "combinations": Family(combinations, 1500, 20),
    "policy_loss": Family(policy_loss, 1000, 60),
    "gather": Family(gather, 1000, 100),
    "gradient": Family(gradient, 500, 50),
    "repack": Family(repack, 1500, 100),
    "paged": Family(paged, 1000, 100),
    "attention": Family(attention, 500, 50),
}


# Moves inside one memory, where a row that is written too early destroys one that is still to be read: 10,000 more.
MOVES = {
    "repack in place": Family(partial(repack, in_place=True), 5000, 100),
    "paged in place": Family(partial(paged, in_place=True), 5000, 100),
}


def random_case(name: str, seed: int, most: int) -> Problem:
    """Case number `seed`: shapes of at most about `most` a side."""
    family = (RANDOM | MOVES)[name]
    return family.make(Dice(Random(f"{name} {seed % family.structures}"), Random(f"{name} values {seed}")), most)
