"""Problems for every op: inputs made on the CPU from a seed, and the call that answers them on any device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import score

Tensors = dict[str, Tensor]
SCALE = os.environ.get("CACOVID_GPU_SCALE", "full")
DATA = Path(__file__).parents[1] / "data"


def golden(folder: str) -> dict[str, dict[str, Any]]:
    """All vectors of a folder of published results, by name."""
    return {path.stem: dict(np.load(path)) for path in sorted((DATA / folder).glob("*.npz"))}


class Problem(NamedTuple):
    """`run(make(seed))` on two backends has the same bits, but for the results in `close`."""

    family: str
    make: Callable[[int], Tensors]
    run: Callable[[Tensors], Tensors]
    close: frozenset[str] = frozenset()


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ascending(seed: int, n: int, k: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def fields(result: object, *names: str) -> Tensors:
    return {name: getattr(result, name) for name in names}


# ---- one problem of a usual size for every op ---------------------------------------------------


def _select(small: bool, dtype: torch.dtype) -> Problem:
    t, p = (3, 20) if small else (32, 196)

    def make(seed: int) -> Tensors:
        return {"tokens": normal(seed, t, p, dtype=dtype), "frames": normal(seed + 1, t, dtype=dtype)}

    def run(x: Tensors) -> Tensors:
        kept = ck.select_tokens(x["tokens"], x["frames"], keep_ratio=0.1)
        return fields(kept, "indices", "frame_counts", "frame_status")

    return Problem("select", make, run)


def _ragged_select(small: bool) -> Problem:
    grid = [(2, 3, 4), (1, 2, 2)] if small else [(7, 14, 14), (1, 5, 9), (33, 10, 18), (2, 27, 27)]
    tokens, frames = sum(t * h * w for t, h, w in grid), sum(t for t, _, _ in grid)

    def run(x: Tensors) -> Tensors:
        kept = ck.select_tokens(x["tokens"], x["frames"], grid, keep_ratio=0.25, order="score", mode="strict")
        return fields(kept, "indices", "frame_counts", "frame_status")

    return Problem("select", lambda seed: {"tokens": normal(seed, tokens), "frames": normal(seed + 1, frames)}, run)


def _budget(small: bool) -> Problem:
    t = 5 if small else 768

    def run(x: Tensors) -> Tensors:
        return {"counts": ck.allocate_budget(x["frames"], [(t, 14, 14)], keep_ratio=0.1)}

    return Problem("select", lambda seed: {"frames": normal(seed, t)}, run)


def _topk(rows: int, length: int, order: str) -> Problem:
    def run(x: Tensors) -> Tensors:
        return {"indices": ck.segmented_topk(x["scores"], length // 10, order=order)}

    return Problem("select", lambda seed: {"scores": normal(seed, rows, length)}, run)


def step_of(seed: int) -> Tensor:
    """The number of a step, as a tensor: a graph draws afresh when it changes."""
    return torch.tensor(977 * seed)


def gumbel(small: bool) -> Problem:
    rows, n, k, samples = (1, 10, 3, 2) if small else (32, 196, 20, 4)

    def run(x: Tensors) -> Tensors:
        drawn = ck.gumbel_topk(x["logits"], k, num_samples=samples, seed=-5, step=x["step"])
        return fields(drawn, "indices", "log_prob", "status")

    return Problem(
        "sample", lambda seed: {"logits": normal(seed, rows, n), "step": step_of(seed)}, run, frozenset({"log_prob"})
    )


def _log_prob(small: bool) -> Problem:
    rows, n, k = (2, 8, 3) if small else (32, 196, 20)

    def make(seed: int) -> Tensors:
        return {
            "logits": normal(seed, rows, n),
            "indices": torch.stack([ascending(seed + r, n, k) for r in range(rows)]),
        }

    def run(x: Tensors) -> Tensors:
        logits = x["logits"].detach().requires_grad_()
        value = ck.pl_log_prob(logits, x["indices"])
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        return {"value": value.detach(), "gradient": gradient}

    return Problem("sample", make, run, frozenset({"value", "gradient"}))


def combinations(small: bool) -> Problem:
    t, h, w, samples, per_frame = (2, 3, 3, 3, 2) if small else (32, 14, 14, 23, 8)
    ratio = 0.25 if small else 0.02
    names = ("indices", "groups", "frame_indices", "frame_status", "log_prob", "frame_log_prob")

    def make(seed: int) -> Tensors:
        return {"tokens": normal(seed, t * h * w), "frames": normal(seed + 1, t), "step": step_of(seed)}

    def run(x: Tensors) -> Tensors:
        drawn = ck.sample_combinations(
            x["tokens"], x["frames"], [(t, h, w)], num_samples=samples, num_frame_samples=per_frame, keep_ratio=ratio,
            seed=2**63 + 1, step=x["step"], mode="strict",
        )  # fmt: skip
        return fields(drawn, *names)

    return Problem("combinations", make, run, frozenset({"log_prob", "frame_log_prob"}))


def _policy_loss(small: bool) -> Problem:
    g, n = (4, 40) if small else (115, 6272)

    def make(seed: int) -> Tensors:
        return {
            "logits": normal(seed, n, 2),
            "old": normal(seed + 1, n, 2),
            "masks": normal(seed + 2, g, n) > 1,
            "rewards": normal(seed + 3, g),
        }

    def run(x: Tensors) -> Tensors:
        logits = x["logits"].detach().requires_grad_()
        loss = ck.combination_policy_loss(logits, x["old"], x["masks"], x["rewards"], kl_weight=0.1)
        (gradient,) = torch.autograd.grad(loss, logits)
        return {"loss": loss.detach(), "gradient": gradient}

    return Problem("policy_loss", make, run, frozenset({"loss"}))


def _gather(small: bool) -> Problem:
    n, size, k = (20, 16, 5) if small else (6272, 3584, 627)

    def make(seed: int) -> Tensors:
        return {
            "embeds": normal(seed, n, size, dtype=torch.bfloat16),
            "positions": torch.arange(3 * n).view(3, n) + seed,
            "mask": normal(seed + 1, n) > 0,
            "index": ascending(seed, n, k),
        }

    def run(x: Tensors) -> Tensors:
        tensors = {name: x[name] for name in ("embeds", "positions", "mask")}
        return ck.gather_tokens(tensors, x["index"], dim={"embeds": 0, "positions": 1, "mask": 0})

    return Problem("gather", make, run)


def _gather_gradient(small: bool) -> Problem:
    n, size, g, k = (12, 16, 3, 4) if small else (6272, 512, 16, 128)

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(-1, n, (g, k), generator=generator)
        return {"x": normal(seed, n, size), "index": index, "grad": normal(seed + 1, g, k, size)}

    def run(x: Tensors) -> Tensors:
        source = x["x"].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ck.gather_tokens(source, x["index"], dim=0), source, x["grad"])
        return {"gradient": gradient}

    return Problem("gather", make, run)


def _cache(seed: int, small: bool) -> Tensors:
    layers, h, n, d = (2, 2, 12, 16) if small else (4, 4, 1024, 128)
    tensors = {f"{kind}{i}": normal(seed + 2 * i + j, 1, h, n, d, dtype=torch.bfloat16)
               for i in range(layers) for j, kind in enumerate(("k", "v"))}  # fmt: skip
    return {**tensors, "keep": ascending(seed, n, n // 4)}


def _named(keys: list[Tensor], values: list[Tensor]) -> Tensors:
    return {f"{kind}{i}": x for kind, xs in (("k", keys), ("v", values)) for i, x in enumerate(xs)}


def _repack(small: bool, inplace: bool = False, rope: bool = False) -> Problem:
    size = 16 if small else 128

    def run(x: Tensors) -> Tensors:
        keys, values = ([x[name] for name in x if name[0] == kind and name != "keep"] for kind in "kv")
        if inplace:
            keys, values = [key.clone() for key in keys], [value.clone() for value in values]
        frequencies = 1e6 ** (-torch.arange(0, size, 2, device=x["keep"].device) / size)
        turned = ck.Rope(frequencies) if rope else None
        return _named(*ck.repack_kv((keys, values), x["keep"], inplace=inplace, rope=turned))

    # The angles come from torch's cosine, which is another one on a GPU.
    close = frozenset(name for name in _cache(0, True) if name[0] == "k") if rope else frozenset()
    if rope and not small:
        close = frozenset(f"k{i}" for i in range(4))
    return Problem("repack", lambda seed: _cache(seed, small), run, close)


def _paged(small: bool, in_place: bool, rope: bool = False) -> Problem:
    """Two sequences whose pages and tables are not in order; one keeps fewer rows."""
    layers, h, n, d, size = (2, 2, 12, 16, 4) if small else (4, 4, 1024, 128, 16)
    kept = n // 4
    used, free = 2 * n // size, 2 * -(-kept // size)

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{kind}{i}": normal(seed + 2 * i + j, used + free, size, h, d, dtype=torch.bfloat16)
                   for i in range(layers) for j, kind in enumerate(("k", "v"))}  # fmt: skip
        order = torch.randperm(used + free, generator=generator).int()
        keep = torch.stack([ascending(seed + b, n - 3, kept) for b in range(2)])
        keep[1, kept // 2 :] = -1
        lens = torch.tensor([n, n - 3], dtype=torch.int32)
        return {
            **tensors,
            "keep": keep,
            "table": order[:used].view(2, -1),
            "free": order[used:].view(2, -1),
            "lens": lens,
        }

    def run(x: Tensors) -> Tensors:
        keys, values = ([x[f"{kind}{i}"].clone() for i in range(layers)] for kind in "kv")
        turned = ck.Rope(1e6 ** (-torch.arange(0, d, 2, device=x["keep"].device) / d)) if rope else None
        where = None if in_place else x["free"]
        found = ck.repack_paged_kv((keys, values), x["table"], x["lens"], x["keep"], out_block_table=where, rope=turned)
        names = ("block_table", "seq_lens", "freed_blocks", "num_freed", "status")
        return {**_named(keys, values), **fields(found, *names)}

    close = frozenset(f"k{i}" for i in range(layers)) if rope else frozenset()
    return Problem("paged", make, run, close)


def _frame_pool(small: bool) -> Problem:
    t, p, size = (2, 6, 32) if small else (32, 196, 3584)

    def run(x: Tensors) -> Tensors:
        rrms, means = score._frame_pool(x["hidden"], [t, 1, p], 1e-6)
        return {"rrms": rrms, "means": means}

    def make(seed: int) -> Tensors:
        return {"hidden": normal(seed, t * p, size, dtype=torch.bfloat16)}

    return Problem("score", make, run, frozenset({"rrms", "means"}))


def _attention(small: bool) -> Problem:
    heads, key_heads, rows, n, size = (4, 2, 3, 70, 16) if small else (28, 4, 32, 6272, 128)

    def make(seed: int) -> Tensors:
        return {
            "query": normal(seed, 1, heads, rows, size, dtype=torch.float32),
            "keys": normal(seed + 1, 1, key_heads, n, size, dtype=torch.float32),
            "mask": normal(seed + 2, 1, n) > -1,
            "positions": torch.arange(n - rows, n),
        }

    def run(x: Tensors) -> Tensors:
        return {"scores": ck.attention_scores(x["query"], x["keys"], mask=x["mask"], row_positions=x["positions"])}

    return Problem("attention", make, run, frozenset({"scores"}))


def problems(small: bool) -> dict[str, Problem]:
    """Every op once or more, at the size of a 7B model's prompt or, `small`, at one for an interpreter."""
    return {
        "select float32": _select(small, torch.float32),
        "select bfloat16": _select(small, torch.bfloat16),
        "select float16": _select(small, torch.float16),
        "select ragged": _ragged_select(small),
        "budget": _budget(small),
        "top-k of rows": _topk(*((3, 20) if small else (64, 196)), "index"),
        "top-k of a long row": _topk(1, (100 if SCALE == "dry" else 10_000) if small else 2**20, "score"),
        "gumbel": gumbel(small),
        "log_prob": _log_prob(small),
        "combinations": combinations(small),
        "policy_loss": _policy_loss(small),
        "gather": _gather(small),
        "gather gradient": _gather_gradient(small),
        "repack": _repack(small),
        "repack in place": _repack(small, inplace=True),
        "repack with rope": _repack(small, rope=True),
        "paged in place": _paged(small, in_place=True),
        "paged to free blocks": _paged(small, in_place=False),
        "paged with rope": _paged(small, in_place=True, rope=True),
        "frame_pool": _frame_pool(small),
        "attention": _attention(small),
    }


# Where every line shall run, but each kernel takes an interpreter seconds.
SOME = ["select float32", "gather", "repack in place"] if SCALE == "dry" else list(problems(True))


def on(device: torch.device, tensors: Tensors) -> Tensors:
    return {name: x.to(device) for name, x in tensors.items()}


def assert_same(found: Tensors, wanted: Tensors, close: frozenset[str] = frozenset()) -> None:
    """Shapes, dtypes and every bit, or in `close` to about float32's precision (that of the dtype for others)."""
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        mine, theirs = x.cpu(), wanted[name].cpu()
        assert mine.shape == theirs.shape, name
        assert mine.dtype == theirs.dtype, name
        if name in close:
            rtol, atol = (1e-5, 3e-6) if mine.dtype == torch.float32 else (1e-2, 1e-2)
            torch.testing.assert_close(
                mine, theirs, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(bits(mine), bits(theirs)), name


def bits(x: Tensor) -> Tensor:
    """The memory of `x` as integers: NaN equals itself, -0 differs from 0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
