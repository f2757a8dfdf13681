"""The k best of segments and of long rows: the same bits as the CPU engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.native import select as engine
from cacovid_kernels.reference.exact import order_key
from cacovid_kernels.triton import radix, topk
from cacovid_kernels.triton.launch import launch
from cacovid_kernels.triton.radix import CHUNK, row_thresholds

NAN, INF = math.nan, math.inf
counts_before = radix.counts_before
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def odd_scores(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Scores with ties, both zeros, infinities, NaN of both signs and denormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator).mul(3).round() / 2
    fine = torch.rand(n, generator=generator) < 0.3
    x = torch.where(fine, torch.randn(n, generator=generator), x)
    odd = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-42, 6e-8, 3e38])
    pick = odd[torch.randint(0, len(odd), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.2, pick, x).to(dtype)


def check(scores: torch.Tensor, bounds: list[int], k: list[int], ranked: bool) -> None:
    """Compares positions and status with the engine's."""
    found, status = topk.segmented_topk(scores, bounds, k, ranked)
    expected, expected_status = engine.segmented_topk(scores, bounds, k, ranked)
    assert torch.equal(found, expected), (bounds, k, ranked)
    assert torch.equal(status, expected_status)


# ---- segments in registers ----------------------------------------------------------------------


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, ranked):
    for n in (1, 16, 33) if ranked else (1, 2, 15, 64, 196):
        scores = odd_scores(3 * n, dtype, n).reshape(3, n)
        for k in sorted({0, n // 3, n}):
            check(scores, [0, n, 2 * n, 3 * n], [k] * 3, ranked)


@pytest.mark.parametrize("ranked", [False, True])
def test_ragged_segments(ranked):
    lengths = [5, 0, 0, 12, 12, 12, 1, 31, 31]
    k = [5, 0, 0, 3, 3, 4, 0, 7, 7]
    bounds = [0, *np.cumsum(lengths).tolist()]
    check(odd_scores(bounds[-1]), bounds, k, ranked)


@pytest.mark.parametrize("ranked", [False, True])
def test_strides_and_offsets(ranked):
    memory = odd_scores(700, torch.bfloat16)
    check(memory[3::4], [0, 20, 40, 60, 175], [6, 6, 7, 9], ranked)
    check(memory[:105].reshape(35, 3).t(), [0, 35, 70, 105], [9] * 3, ranked)
    check(memory[5:].as_strided((3, 20), (100, 2)), [0, 20, 40, 60], [4] * 3, ranked)
    check(memory[7].expand(3, 20), [0, 20, 40, 60], [4] * 3, ranked)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty(shape):
    assert ck.segmented_topk(torch.zeros(shape), 0).shape == (0,)
    rows = shape[0] if len(shape) == 2 else 1
    check(torch.zeros(shape), [0] * (rows + 1), [0] * rows, False)
    assert topk.segmented_topk(torch.zeros(0), [0], [], False)[1].shape == (0,)


def test_ties_go_to_the_lower_index():
    for ranked in ("index", "score"):
        assert ck.segmented_topk(torch.zeros(2, 30), 4, order=ranked).tolist() == [0, 1, 2, 3, 30, 31, 32, 33]


def test_status():
    scores = torch.tensor([[0.0, NAN], [INF, 0.0], [INF, NAN], [-INF, 0.0]])
    assert topk.segmented_topk(scores, [0, 2, 4, 6, 8], [1] * 4, False)[1].tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="segment 1 has NAN"):
        ck.segmented_topk(torch.tensor([0.0, NAN]), 1, [0, 1, 2], check="raise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leading_bits_tell_all_keys_apart(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    keys = order_key(every).unique()
    digits = keys >> (32 - topk.key_bits(dtype))
    assert (digits.diff() > 0).all()


# ---- long rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranked", [False, True])
def test_long_rows(ranked):
    scores = odd_scores(10_007)
    for k in (0, 1, 2500, 10_006, 10_007):
        check(scores, [0, 10_007], [k], ranked)
    check(scores[: 2 * (CHUNK + 1)].reshape(2, CHUNK + 1), [0, CHUNK + 1, 2 * CHUNK + 2], [77] * 2, ranked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_and_short_segments(dtype):
    bounds = [0, 20, 20 + 5000, 40 + 5000, 5040 + 4097]
    check(odd_scores(2 * bounds[-1], dtype)[::2], bounds, [5, 1000, 20, 4000], False)
    rows = odd_scores(3 * 5001, dtype).reshape(5001, 3).t()
    check(rows, [0, 5001, 10_002, 15_003], [333] * 3, True)


@pytest.mark.parametrize("values", [[0.0], [1.0, 2.0], [NAN, 0.0], [-INF, NAN], [INF, -INF, 1.0]])
def test_long_rows_of_few_values(values):
    pick = torch.randint(0, len(values), (9000,), generator=torch.Generator().manual_seed(1))
    for k in (1, 4096, 4097, 8999):
        check(torch.tensor(values)[pick], [0, 9000], [k], False)


@pytest.mark.parametrize("n", [2**17 + 1, pytest.param(2**20, marks=pytest.mark.nightly)])
def test_very_long_rows(n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    check(scores, [0, n], [1234], False)


def test_row_thresholds():
    """Every row its own k, 0 and N among them; counts per chunk."""
    n, chunks = 2 * CHUNK + 100, 3
    k = torch.tensor([0, 1, n, 5000, 4096, 8200])
    keys = torch.randint(-(2**31), 2**31, (len(k), n), generator=torch.Generator().manual_seed(2))
    keys[2, -3:] = 0  # like the padding
    keys[3] = keys[3] % 7  # many ties
    keys[4, ::2] = -1  # the largest key
    keys[5] &= ~0x3FF  # the last digit is the same everywhere
    threshold, ties, above, equal = row_thresholds(keys.int(), k)
    keys &= 0xFFFFFFFF
    for r, wanted in enumerate(k.tolist()):
        largest = keys[r].sort(descending=True).values
        expected = largest[wanted - 1] if wanted else largest[0]
        assert threshold[r] == expected
        padded = torch.nn.functional.pad(keys[r], (0, chunks * CHUNK - n), value=-1).reshape(chunks, CHUNK)
        assert torch.equal(above[r], (padded > expected).sum(1))
        assert torch.equal(equal[r], (padded == expected).sum(1))
        assert ties[r] == wanted - above[r].sum()


@triton.jit
def before_kernel(counts, out, chunk: tl.int64):
    tl.store(out, counts_before(counts, chunk))


@pytest.mark.parametrize("chunk", [0, 1, 511, 512, 513, 1499])
def test_counts_of_many_chunks(chunk):
    counts, out = torch.arange(1500) * 2**30, torch.empty(1, dtype=torch.int64)
    launch(before_kernel, (1,), counts, out, chunk)
    assert out == counts[:chunk].sum()


# ---- how it is launched -------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        assert not masks, name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    for module in (radix, topk):

        def counted(kernel, *args, launch=module.launch, **options):
            names.append(kernel.fn.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


LONG = ["_keys_kernel", *["_histogram_kernel"] * 3, "_count_kernel", "_emit_kernel"]


def test_launches_and_no_host_reads(launches):
    with NoHostReads():
        topk.segmented_topk(torch.zeros(4, 20), [0, 20, 40, 60, 80], [3] * 4, False)
        assert launches == ["_rows_kernel"]
        topk.segmented_topk(torch.zeros(80), [0, 20, 40, 60, 80], [3] * 4, True)
        assert launches == ["_rows_kernel"] * 2
        topk.segmented_topk(torch.zeros(80), [0, 20, 40, 70, 80], [3] * 4, False)
        assert launches == ["_rows_kernel"] * 5
        launches.clear()
        topk.segmented_topk(torch.zeros(1, 4097), [0, 4097], [3], True)
    assert launches == [*LONG, "_decode_kernel"]
