"""Tensors of more than 2^31 elements, where an address of 32 bits would wrap around."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import score

from .problems import SCALE, assert_same, fields, normal

pytestmark = pytest.mark.skipif(SCALE == "cut", reason="too large for a checker")


@pytest.fixture(autouse=True)
def _memory(gpu):
    yield
    gpu.cuda.empty_cache()


def far_apart(gpu, x: Tensor) -> Tensor:
    """The same rows, more than 2^31 elements from the first to the last."""
    rows, columns = x.shape
    distance = gpu.pick(2**31 // (rows - 1) + 1001, columns + 5)
    storage = torch.zeros((rows - 1) * distance + columns, dtype=x.dtype, device=gpu.device)
    view = storage.as_strided(x.shape, (distance, 1))
    view.copy_(x)
    return view


def same_as_cpu(gpu, run, *inputs: Tensor, close: frozenset[str] = frozenset()) -> None:
    """`run` on rows far apart gives what the CPU engine gives on the rows alone."""
    with ck.use_backend("cpu"):
        wanted = run(*inputs)
    assert_same(run(*(far_apart(gpu, x) if x.dim() == 2 else x.to(gpu.device) for x in inputs)), wanted, close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_of_rows_far_apart(gpu, dtype):
    t, p = gpu.pick((33, 196), (3, 20))

    def run(tokens: Tensor, frames: Tensor) -> dict[str, Tensor]:
        kept = ck.select_tokens(tokens, frames, [(t, 1, p)], keep_ratio=0.1)
        return fields(kept, "indices", "frame_counts", "status")

    same_as_cpu(gpu, run, normal(0, t, p, dtype=dtype), normal(1, t))


def test_topk_of_rows_far_apart(gpu):
    for rows, length, k in gpu.pick([(33, 196, 20), (5, 2**20, 1000)], [(3, 20, 4)]):
        same_as_cpu(gpu, lambda x, k=k: {"indices": ck.segmented_topk(x, k)}, normal(2, rows, length))


def test_gumbel_of_rows_far_apart(gpu):
    def run(x: Tensor) -> dict[str, Tensor]:
        return fields(ck.gumbel_topk(x, 4, num_samples=2, seed=1), "indices", "status")

    same_as_cpu(gpu, run, normal(3, *gpu.pick((9, 5000), (2, 20))))


def test_combinations_of_rows_far_apart(gpu):
    t, h, w = gpu.pick((33, 14, 14), (2, 4, 5))

    def run(x: Tensor) -> dict[str, Tensor]:
        drawn = ck.sample_combinations(x, None, [(t, h, w)], num_samples=5, keep_ratio=0.1, seed=1, mode="strict")
        return fields(drawn, "indices", "groups", "status")

    same_as_cpu(gpu, run, normal(4, t, h * w))


def test_topk_of_many_long_segments(gpu):
    """Positions beyond 2^31: the last segments against the CPU engine."""
    segments, length, k = gpu.pick((2200, 2**20, 10), (4, 300, 3))
    scores = torch.empty(segments * length, dtype=torch.float16, device=gpu.device)
    scores.normal_(generator=torch.Generator(gpu.device).manual_seed(0))
    bounds = range(0, (segments + 1) * length, length)
    found = ck.segmented_topk(scores, k, list(bounds))
    first = (segments - 2) * length
    with ck.use_backend("cpu"):
        wanted = ck.segmented_topk(scores[first:].cpu(), k, [0, length, 2 * length])
    assert torch.equal(found[-2 * k :].cpu(), wanted + first)
    assert found.numel() == segments * k


def test_gather_from_and_into_large_tensors(gpu):
    n, size = gpu.pick((620_000, 3584), (40, 16))
    x = torch.empty(n, size, dtype=torch.int16, device=gpu.device).random_(
        generator=torch.Generator(gpu.device).manual_seed(0)
    )
    index = torch.arange(n - 1, -1, -1, device=gpu.device)
    found = ck.gather_tokens(x, index, dim=0)
    assert torch.equal(found, x.flip(0))
    few = torch.tensor([0, n // 2, n - 1], device=gpu.device)
    assert torch.equal(ck.gather_tokens(x, few, dim=0), x[few])
    del found
    out = torch.zeros(n, size, dtype=torch.int16, device=gpu.device)
    ck.gather_tokens(x, index, dim=0, out=out)
    assert torch.equal(out[-1], x[0])
    assert torch.equal(out[0], x[-1])


def test_gradient_of_a_large_tensor(gpu):
    n, size = gpu.pick((620_000, 3584), (40, 16))
    x = torch.zeros(n, size, dtype=torch.bfloat16, device=gpu.device, requires_grad=True)
    index = torch.tensor([n - 1, 3, n - 1, n // 2], device=gpu.device)
    (gradient,) = torch.autograd.grad(ck.gather_tokens(x, index, dim=0).float().sum(), x)
    assert (gradient[n - 1] == 2).all()
    assert (gradient[[3, n // 2]] == 1).all()
    assert int(gradient.sum(dtype=torch.float64)) == 4 * size


@pytest.mark.parametrize("inplace", [False, True])
def test_repack_of_a_large_cache(gpu, inplace):
    n, size = gpu.pick((4_300_000, 128), (40, 16))
    shape = (1, 4, n, size)
    keys, values = (
        torch.empty(shape, dtype=torch.int16, device=gpu.device).random_(
            generator=torch.Generator(gpu.device).manual_seed(i)
        )
        for i in range(2)
    )
    keep = torch.arange(1, n, 3, device=gpu.device)
    wanted = [x.index_select(2, keep) for x in (keys, values)]
    (kept_keys,), (kept_values,) = ck.repack_kv(([keys], [values]), keep, inplace=inplace)
    assert torch.equal(kept_keys, wanted[0])
    assert torch.equal(kept_values, wanted[1])


@pytest.mark.parametrize("in_place", [True, False])
def test_pages_of_a_large_cache(gpu, in_place):
    """Blocks at both ends of more than 2^31 elements; the other blocks are not touched."""
    blocks, block, heads, size = gpu.pick((300_000, 16, 4, 128), (24, 4, 2, 8))
    keys, values = (torch.zeros(blocks, block, heads, size, dtype=torch.int16, device=gpu.device) for _ in range(2))
    table = torch.tensor([[blocks - 1, 3, blocks - 5], [0, blocks - 2, 7]], device=gpu.device)
    free = torch.tensor([[blocks - 8, 9], [11, blocks - 12]], device=gpu.device)
    for i, x in enumerate((keys, values)):
        rows = normal(i, *table.shape, block, heads, size).mul(1000).to(torch.int16)
        x[table] = rows.to(gpu.device)
    keep = torch.arange(1, 3 * block, 2, device=gpu.device)
    wanted = [x[table].flatten(1, 2)[:, keep] for x in (keys, values)]
    lens = torch.full((2,), 3 * block, device=gpu.device)
    found = ck.repack_paged_kv((keys, values), table, lens, keep, out_block_table=None if in_place else free)
    for x, rows in zip((keys, values), wanted, strict=True):
        assert torch.equal(x[found.block_table.long()].flatten(1, 2)[:, : keep.numel()], rows)
        x[table] = 0
        x[free] = 0
        assert int(x.count_nonzero()) == 0
    assert not found.status.any()


def test_statistics_of_many_rows(gpu):
    frames, p, size = gpu.pick((3100, 196, 3584), (3, 6, 32))
    hidden = torch.empty(frames * p, size, dtype=torch.bfloat16, device=gpu.device)
    hidden.normal_(generator=torch.Generator(gpu.device).manual_seed(0))
    rrms, means = score._frame_pool(hidden, [frames, 1, p], 1e-6)
    last = hidden[-p:].float()
    torch.testing.assert_close(rrms[-p:], torch.rsqrt(last.square().mean(1) + 1e-6), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means[-1], last.mean(0), rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(rrms).all() and torch.isfinite(means).all())


def test_scores_of_many_rows(gpu):
    n, size = gpu.pick((620_000, 3584), (30, 32))
    torch.manual_seed(0)
    head = ck.PolicyHead(size).to(gpu.device, torch.bfloat16)
    weight = torch.ones(size, dtype=torch.bfloat16, device=gpu.device)
    hidden = torch.empty(n, size, dtype=torch.bfloat16, device=gpu.device)
    hidden.normal_(generator=torch.Generator(gpu.device).manual_seed(0))
    with torch.no_grad():
        scores, _ = ck.score_tokens(hidden, head, norm_weight=weight)
        few, _ = ck.score_tokens(hidden[-20:].clone(), head, norm_weight=weight)
    torch.testing.assert_close(scores[-20:], few, rtol=0.02, atol=0.02 * few.abs().max().item())
