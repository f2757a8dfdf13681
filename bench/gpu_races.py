"""Which ops race against what on a GPU, at which shapes; the most important first."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from baselines import attention as attentions
from baselines import combinations as combos
from baselines import paged as pageds
from baselines import policy_loss as losses
from baselines import repack as repacks
from baselines import score as scores
from baselines import select as selects
from gpu_device import Device
from gpu_measure import Race, close, equal, nearly_the_same_set, same_size
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import score as score_ops

SIZE = 3584


def normal(gpu: Device, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(gpu.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=gpu.device, dtype=dtype)


def disjoint(gpu: Device, n: int, k: int, most: int) -> list[Tensor]:
    """Ascending lists of k positions out of n; no two of the lists share one."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(gpu.device)
    return [part.sort().values for part in order.split(k)[: min(n // k, most)]]


def copy_of(gpu: Device, size: int) -> Callable[..., Tensor]:
    """A plain copy that moves `size` bytes in all, each time from and to other memory."""
    half = max(size // 2, 1)
    count = max(2, gpu.pick(2**28, 2**14) // half)
    pairs = torch.zeros(2, count, half, dtype=torch.uint8, device=gpu.device)
    turn = itertools.cycle(range(count))
    return lambda *_: pairs[0, (i := next(turn))].copy_(pairs[1, i])


# ---- selection ----------------------------------------------------------------------------------


def select(gpu: Device, frames: int, everybody: bool) -> Race:
    p, t = selects.P, gpu.pick(frames, 2)
    inputs = [(normal(gpu, i, t, p), normal(gpu, 1000 + i, t)) for i in range(gpu.pick(16, 1))]

    def ours(token: Tensor, frame: Tensor) -> Tensor:
        return ck.select_tokens(
            token, frame, keep_ratio=selects.KEEP, importance_ratio=selects.IMPORTANCE, max_frame_ratio=selects.CAP
        ).indices

    def check(ours: list[Tensor], theirs: list[Tensor]) -> float | None:
        if theirs[0].dim() == 1:
            return nearly_the_same_set(ours, theirs)
        if not torch.isin(theirs[0][:, 0] + torch.arange(t, device=gpu.device) * p, ours[0]).all():
            raise ValueError("the best token of a frame is not kept")  # every frame gets one or more
        return None

    contestants = {
        "ours": ours,
        "vectorised torch": selects.vectorised_torch,
        "torch.topk alone": lambda token, frame: token.topk(14, dim=-1).indices,
    }
    if importlib.util.find_spec("flashinfer"):
        from flashinfer import top_k

        contestants["FlashInfer top_k alone"] = lambda token, frame: top_k(token, 14)[1]
    if everybody:
        contestants["torch.compile of it"] = gpu.compile(selects.vectorised_torch, dynamic=False)
        contestants["published formula"] = selects.published_formula
    kept = int(selects.KEEP * t * p)
    return Race(
        "select", f"{t} x {p} float32, keep 10%", contestants, inputs, check,
        bytes=4 * t * p + 4 * t + 8 * kept + 8 * t,
    )  # fmt: skip


def topk(gpu: Device, rows: int, length: int) -> Race:
    rows, length = gpu.pick((rows, length), (2, 60))
    k = length // 10
    inputs = [(normal(gpu, i, rows, length),) for i in range(gpu.pick(8, 1))]

    def values_of(result: list[Tensor]) -> Tensor:
        return inputs[0][0].view(-1)[result[-1].reshape(-1)].view(rows, k).sort(-1).values

    def flat(x: Tensor) -> Tensor:
        return x.topk(k, sorted=False).indices

    def check(ours: list[Tensor], theirs: list[Tensor]) -> None:  # ties may fall to other positions
        first = torch.arange(rows, device=gpu.device)[:, None] * length
        equal([values_of(ours)], [values_of([theirs[0] + first])])

    return Race(
        "segmented_topk", f"{rows} x {length} float32, k={k}",
        {"ours": lambda x: ck.segmented_topk(x, k), "torch.topk": flat}, inputs, check,
        bytes=4 * rows * length + 8 * rows * k,
    )  # fmt: skip


# ---- sampling -----------------------------------------------------------------------------------


def combinations(gpu: Device, frames: int, everybody: bool) -> Race:
    t, samples, p = gpu.pick(frames, 1), gpu.pick(23, 2), combos.P
    inputs = [(normal(gpu, i, t, p), samples) for i in range(gpu.pick(16, 1))]

    def ours(token: Tensor, samples: int) -> Tensor:
        return ck.sample_combinations(
            token, num_samples=samples, keep_ratio=combos.RATE, group_size=combos.GROUP_SIZE,
            max_group_prob=combos.MAX_GROUP, seed=0,
        ).indices  # fmt: skip

    def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
        """The same row of best tokens, and rows of as many different ones."""
        if theirs[0].dim() == 3:  # masks
            theirs = [theirs[0].flatten(1).nonzero()[:, 1].view(samples, -1)]
        equal([ours[0][0]], [theirs[0][0]])
        if theirs[0].shape != ours[0].shape or not bool((theirs[0].diff(dim=-1) > 0).all()):
            raise ValueError("not as many different tokens as ours")

    contestants = {"ours": ours, "vectorised torch": combos.vectorised_torch}
    if everybody:
        contestants["torch.compile of it"] = combos.compiled_torch(
            gpu.device, lambda call: gpu.compile(call, dynamic=False)
        )
        contestants["published formula"] = combos.published_formula
    moved = 4 * t * p + samples * t * (8 * combos.DRAW + 8 + 4)
    shape = f"{samples} x {t} x {p} float32, draw {combos.DRAW}"
    return Race("combinations", shape, contestants, inputs, check, bytes=moved)


def gumbel(gpu: Device, rows: int, length: int, k: int, samples: int) -> Race:
    rows, length, k, samples = gpu.pick((rows, length, k, samples), (1, 20, 3, 1))
    inputs = [(normal(gpu, i, rows, length), k, samples) for i in range(gpu.pick(8, 1))]
    contestants = {
        "ours": lambda x, k, samples: ck.gumbel_topk(x, k, num_samples=samples, seed=0).indices,
        "exponential_ and topk": combos.gumbel_torch,
        "torch.compile of it": gpu.compile(combos.gumbel_torch, dynamic=False),
        "multinomial": lambda x, k, samples: torch.multinomial(x.softmax(-1).repeat(samples, 1), k),
    }
    moved = 4 * rows * length + samples * rows * (8 * k + 4)
    return Race("gumbel_topk", f"{samples} x {rows} x {length}, k={k}", contestants, inputs, same_size, bytes=moved)


# ---- compaction ---------------------------------------------------------------------------------


def gather(gpu: Device, frames: int, percent: int, everybody: bool) -> Race:
    n, size = gpu.pick((frames * 196, SIZE), (60, 16))
    kept = n * percent // 100
    sets = max(2, -(-3 * gpu.l2_bytes // (2 * kept * size))) if not gpu.dry else 2
    big = normal(gpu, 0, sets * n, size, dtype=torch.bfloat16)
    lists = disjoint(gpu, n, kept, sets)
    outs = torch.zeros(sets, kept, size, dtype=big.dtype, device=gpu.device)
    inputs = [(big[i * n : (i + 1) * n], lists[i % len(lists)], outs[i]) for i in range(sets)]
    moved = 4 * kept * size + 8 * kept
    contestants = {
        "ours": lambda x, i, out: ck.gather_tokens(x, i, dim=0, out=out),
        "index_select(out=)": lambda x, i, out: torch.index_select(x, 0, i, out=out),
        "copy of as many bytes": copy_of(gpu, moved),
    }
    if everybody:
        contestants["x[index]"] = lambda x, i, out: x[i]
        contestants["torch.compile of it"] = gpu.compile(lambda x, i, out: x[i], dynamic=False)
    return Race(
        "gather", f"{percent}% of {n} x {size} bfloat16", contestants, inputs, _copied_or_equal, moved, rotates=True
    )


def _copied_or_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal, unless it is the plain copy of zeros that only shows what memory can do."""
    if theirs[0].dtype != torch.uint8:
        equal(ours, theirs)


def gather_prompt(gpu: Device) -> Race:
    n, size = gpu.pick((6272, SIZE), (60, 16))
    kept = n // 10
    prompt = {
        "embeds": normal(gpu, 0, n, size, dtype=torch.bfloat16),
        "positions": torch.arange(3 * n, device=gpu.device).view(3, n),
        "mask": torch.ones(n, device=gpu.device),
        "labels": torch.arange(n, device=gpu.device),
    }
    axis = {"embeds": 0, "positions": 1, "mask": 0, "labels": 0}
    out = ck.gather_tokens(prompt, torch.arange(kept, device=gpu.device), dim=axis)
    contestants = {
        "ours": lambda i: ck.gather_tokens(prompt, i, dim=axis, out=out),
        "index_select(out=) each": lambda i: {
            name: torch.index_select(x, axis[name], i, out=out[name]) for name, x in prompt.items()
        },
    }
    inputs = [(i,) for i in disjoint(gpu, n, kept, 10)]
    moved = 4 * kept * size + kept * (2 * 8 * 3 + 2 * 4 + 2 * 8 + 8)
    return Race("gather", f"10% of a prompt of {n}: 4 tensors", contestants, inputs, equal, moved)


def gather_combinations(gpu: Device) -> Race:
    n, size, g, k = gpu.pick((6272, SIZE, 32, 128), (60, 16, 3, 5))
    x = normal(gpu, 0, n, size, dtype=torch.bfloat16)
    lists = [torch.randint(0, n, (g, k), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    outs = torch.zeros(g, k, size, dtype=x.dtype, device=gpu.device)
    contestants = {
        "ours": lambda i: ck.gather_tokens(x, i, dim=0, out=outs),
        "index_select(out=)": lambda i: torch.index_select(x, 0, i.view(-1), out=outs.view(g * k, size)),
        "x[index]": lambda i: x[i],
        "repeat, then gather": lambda i: x.repeat(g, 1, 1).gather(1, i[..., None].expand(-1, -1, size)),
    }
    rows = g * k + lists[0].unique().numel()
    inputs = [(i.to(gpu.device),) for i in lists]
    return Race("gather", f"{g} combinations of {k} from {n} x {size}", contestants, inputs, equal, 2 * rows * size)


def gather_gradient(gpu: Device) -> Race:
    n, size, g, k = gpu.pick((6272, SIZE, 32, 128), (60, 16, 3, 5))
    x = normal(gpu, 0, n, size, dtype=torch.bfloat16).requires_grad_()
    grad = normal(gpu, 1, g, k, size, dtype=torch.bfloat16)
    index = torch.randint(0, n, (g, k), generator=torch.Generator().manual_seed(0)).to(gpu.device)

    def ours(index: Tensor) -> Tensor:
        return torch.autograd.grad(ck.gather_tokens(x, index, dim=0), x, grad)[0]

    def torchs(index: Tensor) -> Tensor:
        return torch.autograd.grad(x.index_select(0, index.view(-1)), x, grad.view(-1, size))[0]

    contestants = {"ours": ours, "index_select": torchs}
    moved = 2 * size * (3 * g * k + n)
    return Race("gather", f"gradient of {g} combinations of {k}", contestants, [(index,)], close, moved)


def repack(gpu: Device, percent: int, inplace: bool, tokens: int = 6272, rope: bool = False) -> Race:
    layers, heads, n, size = gpu.pick((28, 4, tokens, 128), (1, 2, 20, 16))
    kept = n * percent // 100
    tensors = [normal(gpu, i, 1, heads, n, size, dtype=torch.bfloat16) for i in range(2 * layers)]
    keys, values = tensors[:layers], tensors[layers:]
    turned = ck.Rope(1e6 ** (-torch.arange(0, size, 2, device=gpu.device) / size)) if rope else None
    moved = 2 * 2 * layers * heads * kept * 2 * size
    contestants = {
        "ours": lambda i: ck.repack_kv((keys, values), i, inplace=inplace, rope=turned),
        **repacks.baselines(tensors, kept),
        "copy of as many bytes": copy_of(gpu, moved),
    }
    answers = {}
    if inplace:
        answers["ours"] = lambda i: ck.repack_kv(
            ([x.clone() for x in keys], [x.clone() for x in values]), i, inplace=True
        )
    inputs = [(i,) for i in disjoint(gpu, n, kept, 10)]
    how = "in place" if inplace else "new memory"
    shape = f"{percent}% of {layers} x {heads} x {n} x {size} bfloat16, {how}{', rope' if rope else ''}"
    check = same_size if rope else _copied_or_equal
    return Race("repack", shape, contestants, inputs, check, moved, rotates=not gpu.dry, answers=answers)


def paged(gpu: Device, percent: int) -> Race:
    """Within the pages of 4 sequences, in blocks of 16."""
    layers, heads, n, size, block, b = gpu.pick((28, 4, 1568, 128, 16, 4), (1, 2, 20, 16, 4, 2))
    kept = n * percent // 100
    blocks = torch.randperm(b * n // block, generator=torch.Generator().manual_seed(0))
    table, lens = blocks.view(b, -1).int().to(gpu.device), torch.full((b,), n, dtype=torch.int32, device=gpu.device)
    shape = (b * n // block, block, heads, size)
    tensors = [normal(gpu, i, *shape, dtype=torch.bfloat16) for i in range(2 * layers)]

    def all_of(tensors: list[Tensor]) -> dict[str, Callable]:
        def ours(i: Tensor) -> list[Tensor]:
            ck.repack_paged_kv((tensors[:layers], tensors[layers:]), table, lens, i)
            return tensors

        return {"ours": ours, **pageds.baselines(tensors, table.long())}

    moved = 2 * 2 * layers * b * heads * kept * 2 * size
    contestants = {**all_of(tensors), "copy of as many bytes": copy_of(gpu, moved)}
    answers = {name: lambda i, name=name: all_of([x.clone() for x in tensors])[name](i) for name in all_of(tensors)}
    inputs = [(i,) for i in disjoint(gpu, n, kept, 10)]
    name = f"{percent}% of {layers} x {b} x {n} x {heads} x {size} bfloat16, in place"
    return Race("paged", name, contestants, inputs, _copied_or_equal, moved, rotates=not gpu.dry, answers=answers)


# ---- scores -------------------------------------------------------------------------------------


def _hidden(gpu: Device) -> list[tuple[Tensor]]:
    dtype = gpu.pick(torch.bfloat16, torch.float32)  # Triton's interpreter multiplies bfloat16 wrongly
    n, size = gpu.pick((32 * 196, SIZE), (196, 16))
    return [(normal(gpu, i, n, size, dtype=dtype),) for i in range(gpu.pick(4, 1))]


@torch.no_grad()
def head(gpu: Device) -> Race:
    inputs = _hidden(gpu)
    n, size = inputs[0][0].shape
    network = scores.Network(size, inputs[0][0].dtype, gpu.device)
    contestants = {
        "ours": network.ours_tokens,
        "torch.compile of the published": gpu.compile(network.published_tokens, dynamic=False),
        "products alone": network.products,
        "published formula": network.published_tokens,
    }
    weights = sum(p.numel() for p in network.token_head.parameters())
    return Race(
        "score", f"token head {n} x {size} bfloat16", {k: torch.no_grad()(v) for k, v in contestants.items()}, inputs,
        _head_check, bytes=2 * n * size + 2 * weights + 4 * n, operations=network.operations(n), rotates=True,
    )  # fmt: skip


def _head_check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    if theirs[0].dim() == 1:  # the products alone have two columns
        close(ours, theirs)


@torch.no_grad()
def both_heads(gpu: Device) -> Race:
    inputs = _hidden(gpu)
    n, size = inputs[0][0].shape
    network = scores.Network(size, inputs[0][0].dtype, gpu.device)
    contestants = {
        "ours": network.ours,
        "torch.compile of the published": gpu.compile(network.published, dynamic=False),
        "published formula": network.published,
    }
    return Race(
        "score", f"both heads {n} x {size} bfloat16", {k: torch.no_grad()(v) for k, v in contestants.items()}, inputs,
        close, bytes=2 * n * size, operations=network.operations(n), rotates=True,
    )  # fmt: skip


def frame_pool(gpu: Device) -> Race:
    inputs = _hidden(gpu)
    n, size = inputs[0][0].shape
    contestants = {
        "ours": lambda x: score_ops._frame_pool(x, [n // 196, 14, 14], scores.EPS),
        "plain torch": scores.plain_statistics,
        "torch.compile of it": gpu.compile(scores.plain_statistics, dynamic=False),
        "published formula": scores.published_statistics,
    }
    moved = 2 * n * size + 4 * n + 4 * n // 196 * size
    return Race("score", f"frame means, row norms {n} x {size}", contestants, inputs, close, moved, rotates=True)


def attention(gpu: Device, rows: int) -> Race:
    dtype = gpu.pick(torch.bfloat16, torch.float32)  # Triton's interpreter multiplies bfloat16 wrongly
    heads, key_heads, n, size = gpu.pick((28, 4, 6272, 128), (4, 2, 70, 16))
    sets = gpu.pick(max(2, -(-3 * gpu.l2_bytes // (2 * key_heads * n * size))), 2)
    inputs = [
        (normal(gpu, i, 1, heads, rows, size, dtype=dtype), normal(gpu, 1000 + i, 1, key_heads, n, size, dtype=dtype))
        for i in range(sets)
    ]
    contestants = {
        "ours": ck.attention_scores,
        "fewest copies": attentions.fewest_copies,
        "torch.compile of it": gpu.compile(attentions.fewest_copies, dynamic=False),
        "softmax of products": attentions.softmax_of_products,
    }
    moved = 2 * size * (key_heads * n + heads * rows) + 4 * n
    count = "1 row" if rows == 1 else f"{rows} rows"
    return Race(
        "attention_scores", f"{count} of {heads} heads, {n} keys of {key_heads} heads x {size} bfloat16",
        contestants, inputs, _scores_close, moved, operations=2 * heads * rows * n * size, rotates=not gpu.dry,
    )  # fmt: skip


def _scores_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Products that are rounded to bfloat16 leave a share of a score of 2^-8 times a logit."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.1, atol=1e-5)


# ---- training -----------------------------------------------------------------------------------


def policy_loss(gpu: Device) -> Race:
    """Loss and gradient; masks packed as the sampler leaves them for us, bool for the others."""
    n, g = gpu.pick((32 * 196, 115), (60, 4))
    inputs = []
    for i in range(gpu.pick(4, 1)):
        logits, old = normal(gpu, 4 * i, n, 2), normal(gpu, 4 * i + 1, n, 2)
        masks, rewards = normal(gpu, 4 * i + 2, g, n) > 1.28, normal(gpu, 4 * i + 3, g)
        inputs.append((logits.requires_grad_(), logits.detach() + 0.2 * old, masks, rewards))

    def with_gradient(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            loss = call(logits, *others)
            return loss, torch.autograd.grad(loss, logits)[0]

        return run

    calls = {
        "ours": ck.combination_policy_loss,
        "fewest passes": losses.fewest_passes,
        "torch.compile of it": gpu.compile(losses.fewest_passes, dynamic=False),
        "published formula": losses.published_formula,
    }
    return Race(
        "policy_loss", f"loss and gradient, {g} x {n}", {name: with_gradient(call) for name, call in calls.items()},
        inputs, close, bytes=g * n + 3 * 8 * n + 8 * n,
    )  # fmt: skip


def races(gpu: Device) -> Iterator[tuple[str, Callable[[], Race]]]:
    """Keys, by which the aims name them, and how each race is made."""
    yield "select T=32", lambda: select(gpu, 32, True)
    yield "combinations T=32", lambda: combinations(gpu, 32, True)
    yield "gather T=512 10%", lambda: gather(gpu, 512, 10, True)
    yield "repack 10%", lambda: repack(gpu, 10, False)
    yield "head", lambda: head(gpu)
    yield "gather T=32 10%", lambda: gather(gpu, 32, 10, True)
    yield "repack 10% in place", lambda: repack(gpu, 10, True)
    yield "select T=768", lambda: select(gpu, 768, True)
    yield "frame_pool", lambda: frame_pool(gpu)
    yield "gather 32 combinations", lambda: gather_combinations(gpu)
    yield "gumbel rows", lambda: gumbel(gpu, 32, 196, 20, 8)
    yield "top-k 1 x 2^20", lambda: topk(gpu, 1, 2**20)
    yield "paged 10%", lambda: paged(gpu, 10)
    yield "repack rope", lambda: repack(gpu, 10, False, rope=True)
    yield "both heads", lambda: both_heads(gpu)
    yield "attention 32 rows", lambda: attention(gpu, 32)
    yield "policy loss", lambda: policy_loss(gpu)
    yield "gather a prompt", lambda: gather_prompt(gpu)
    yield "gather gradient", lambda: gather_gradient(gpu)
    if importlib.util.find_spec("transformers"):
        from gpu_generate import first_token

        yield "first token", lambda: first_token(gpu)
    if gpu.dry:  # the rest are the same lines at other sizes
        return
    for frames, percent in [(512, 25), (768, 10), (768, 25), (128, 25), (128, 10), (64, 25), (64, 10), (32, 25)]:
        yield f"gather T={frames} {percent}%", lambda t=frames, percent=percent: gather(gpu, t, percent, False)
    yield "attention 1 row", lambda: attention(gpu, 1)
    yield "repack 25%", lambda: repack(gpu, 25, False)
    yield "repack 25% in place", lambda: repack(gpu, 25, True)
    yield "paged 25%", lambda: paged(gpu, 25)
    yield "combinations T=128", lambda: combinations(gpu, 128, False)
    for frames in (64, 128, 512):
        yield f"select T={frames}", lambda t=frames: select(gpu, t, False)
    for rows, length in [(32, 196), (1, 6272), (1, 100352), (64, 2**20)]:
        yield f"top-k {rows} x {length}", lambda rows=rows, length=length: topk(gpu, rows, length)
    yield "gumbel a row of 6272", lambda: gumbel(gpu, 1, 6272, 627, 23)
    yield "repack 10% of 100,000", lambda: repack(gpu, 10, False, tokens=100_000)
    yield "repack 25% of 100,000 in place", lambda: repack(gpu, 25, True, tokens=100_000)
