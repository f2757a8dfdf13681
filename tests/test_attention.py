"""Attention scores: float64 truth, bits that padding, batch-mates and threads leave alone, odd values, errors."""

from __future__ import annotations

import math

import pytest
import torch
from common import check_every_instruction_set
from torch import Tensor

import cacovid_kernels as ck

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, K, R, L, D: one of each, groups of 2, 4 and 7, blocks of more than 16 rows, columns that fill no register.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 50, 8),
    (1, 28, 4, 1, 300, 128),
    (2, 14, 2, 5, 133, 100),
    (3, 8, 8, 4, 77, 64),
    (1, 8, 2, 9, 40, 16),
    (1, 2, 1, 2, 2500, 24),
]


def problem(b, h, k, r, n, d, dtype=torch.float32, spread=1.0):
    return (torch.randn(b, h, r, d) * spread).to(dtype), torch.randn(b, k, n, d).to(dtype)


def truth(query, keys, mask=None, row_positions=None, scale=None, per_head=False) -> Tensor:
    """One head and row at a time, over the keys that it sees alone, in float64."""
    (b, h, r, d), (k, n) = query.shape, keys.shape[1:3]
    scores = torch.zeros(b, k, n, dtype=torch.float64)
    for i in range(b):
        rows = 0
        for row in range(r):
            last = n - 1 if row_positions is None else row_positions.expand(b, r)[i, row].item()
            seen = [j for j in range(n) if j <= last and (mask is None or mask[i, j])]
            rows += bool(seen)
            for head in range(h if seen else 0):
                products = keys[i, head // (h // k)].double()[seen] @ query[i, head, row].double()
                scores[i, head // (h // k), seen] += torch.softmax(products * (scale or d**-0.5), 0)
        scores[i] /= max(rows, 1) * (h // k)
    return scores if per_head else scores.mean(1)


def close(found, wanted, rtol=5e-6):
    """Relative, also for small weights: what float32 logits of size 10 and the exponential leave."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1e-9)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(backend, shape, dtype):
    query, keys = problem(*shape, dtype)
    b, r, n = shape[0], shape[3], shape[4]
    masks = (None, torch.rand(b, n) < 0.7)
    positions = (None, torch.randint(-1, n, (b, r)), torch.randint(0, n, (r,)))
    for mask, rows in [(m, p) for m in masks for p in positions]:
        for per_head in (False, True):
            options = {"mask": mask, "row_positions": rows, "per_head": per_head}
            close(ck.attention_scores(query, keys, **options), truth(query, keys, **options))


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 3])
def test_scale(backend, scale):
    query, keys = problem(1, 4, 2, 3, 60, 16)
    wanted = truth(query, keys, scale=scale) if scale else torch.full((1, 60), 1 / 60, dtype=torch.float64)
    close(ck.attention_scores(query, keys, scale=scale), wanted, rtol=2e-5)


@pytest.mark.parametrize("spread", [1e-4, 30.0, 1000.0])
def test_extreme_products_neither_overflow_nor_lose_the_largest(backend, spread):
    query, keys = problem(2, 4, 2, 3, 90, 64, spread=spread)
    found = ck.attention_scores(query, keys)
    torch.testing.assert_close(found.double(), truth(query, keys), rtol=1e-2, atol=1e-3 if spread > 100 else 1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_scores_add_up_to_one(backend):
    query, keys = problem(2, 6, 3, 4, 5000, 32)
    rows = torch.tensor([10, 4000, -1, 4999])
    for per_head in (False, True):
        found = ck.attention_scores(query, keys, row_positions=rows, per_head=per_head)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]), rtol=1e-6, atol=0)
    assert torch.equal(found.argmax(-1) <= 4999, torch.ones(2, 3, dtype=torch.bool))


def test_later_keys_are_not_seen(backend):
    query, keys = problem(1, 2, 1, 3, 40, 16)
    rows = torch.tensor([5, 0, 17])
    found = ck.attention_scores(query, keys, row_positions=rows)
    assert (found[0, :18] > 0).all()
    assert not found[0, 18:].any()
    for past in (39, 40, 2**62):
        whole = ck.attention_scores(query, keys, row_positions=torch.full((3,), past))
        assert torch.equal(whole, ck.attention_scores(query, keys))


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(dtype):
    query, keys = problem(2, 6, 2, 5, 70, 48, dtype)
    mask, rows = torch.rand(2, 70) < 0.8, torch.randint(0, 70, (2, 5))
    expected = ck.attention_scores(query, keys, mask=mask, row_positions=rows)
    views = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: torch.nn.functional.pad(x, (3, 2), value=math.nan)[..., 3:-2],
        lambda x: torch.stack([x, x * math.nan], -1)[..., 0],
    ]
    wide_mask, wide_rows = torch.stack([mask, ~mask], -1)[..., 0], torch.stack([rows, -rows])[0].t().contiguous().t()
    for view in views:
        found = ck.attention_scores(view(query), view(keys), mask=wide_mask, row_positions=wide_rows)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_padding_and_batch_mates_change_no_bit(dtype, per_head):
    """A prompt on the right of a padded batch, its rows among rows of -1, has the scores that it has alone."""
    query, keys = problem(3, 10, 2, 6, 90, 40, dtype)
    mask, rows = torch.ones(3, 90, dtype=torch.bool), torch.full((3, 6), -1)
    for b, (length, words) in enumerate([(90, 6), (57, 3), (1, 1)]):
        mask[b, : 90 - length] = False
        rows[b, 6 - words :] = torch.arange(90 - words, 90)
    keys[1:, :, :20] = math.nan
    found = ck.attention_scores(query, keys, mask=mask, row_positions=rows, per_head=per_head)
    for b, (length, words) in enumerate([(90, 6), (57, 3), (1, 1)]):
        alone = ck.attention_scores(
            query[b : b + 1, :, 6 - words :],
            keys[b : b + 1, :, 90 - length :],
            row_positions=torch.arange(length - words, length),
            per_head=per_head,
        )
        assert torch.equal(found[b, ..., 90 - length :], alone[0])
        assert not found[b, ..., : 90 - length].any()


@pytest.mark.parametrize("per_head", [False, True])
def test_threads_change_no_bit(threads, per_head):
    query, keys = problem(2, 28, 4, 9, 700, 64, torch.bfloat16)
    mask = torch.rand(2, 700) < 0.9
    found = ck.attention_scores(query, keys, mask=mask, per_head=per_head)
    torch.set_num_threads(1)
    assert torch.equal(found, ck.attention_scores(query, keys, mask=mask, per_head=per_head))


ISA_SCRIPT = """
import hashlib, torch, cacovid_kernels as ck
torch.manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n, d, r in ((1, 1, 1), (33, 16, 2), (300, 100, 5), (2100, 64, 3)):
        query, keys = (torch.randn(2, 6, r, d) * 3).to(dtype), torch.randn(2, 2, n, d).to(dtype)
        mask, rows = torch.rand(2, n) < 0.8, torch.randint(-1, n, (2, r))
        for options in ({}, {"mask": mask, "row_positions": rows, "per_head": True}):
            digest.update(ck.attention_scores(query, keys, **options).numpy().tobytes())
print(ck._C.cpu_isa, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set(ISA_SCRIPT)


# ---- odd values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_later_keys_may_hold_anything(backend, bad, dtype):
    query, keys = problem(1, 4, 2, 3, 50, 32, dtype)
    mask, rows = torch.ones(1, 50, dtype=torch.bool), torch.tensor([30, 35, 40])
    mask[0, [0, 1, 7, 22]] = False
    expected = ck.attention_scores(query, keys, mask=mask, row_positions=rows)
    keys[:, :, ~mask[0]] = bad
    keys[:, :, 41:] = bad
    found = ck.attention_scores(query, keys, mask=mask, row_positions=rows)
    assert torch.equal(found, expected)
    assert not found[~mask].any()


@pytest.mark.parametrize("place", [0, 15, 16, 47, 49])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_keys_that_their_row_sees(backend, place, bad):
    query, keys = problem(2, 2, 1, 2, 50, 8)
    query = query.abs() + 0.1
    rows = torch.tensor([3, 48])
    keys[0, 0, place, 2] = bad
    found = ck.attention_scores(query, keys, row_positions=rows)
    nan = torch.zeros(50, dtype=torch.bool)
    for last in rows.tolist():
        nan[: last + 1] |= place <= last
    assert torch.equal(found[0].isnan(), nan)
    assert torch.equal(found[1], ck.attention_scores(query[1:], keys[1:], row_positions=rows)[0])


def test_minus_infinity_has_no_weight_and_alone_no_softmax(backend):
    query, keys = torch.ones(1, 2, 1, 4), torch.randn(1, 1, 30, 4)
    keys[0, 0, :12, 1] = -math.inf
    found = ck.attention_scores(query, keys)
    assert not found[0, :12].any()
    torch.testing.assert_close(found[0, 12:], ck.attention_scores(query, keys[:, :, 12:])[0], rtol=1e-6, atol=0)
    alone = ck.attention_scores(query, keys, row_positions=torch.tensor([11]))
    assert alone[0, :12].isnan().all()
    assert not alone[0, 12:].any()


@pytest.mark.parametrize("per_head", [False, True])
def test_where_nothing_is_seen_scores_are_zero(backend, per_head):
    query, keys = problem(2, 4, 2, 3, 20, 8)
    shape = (2, 2, 20) if per_head else (2, 20)
    zero = torch.zeros(shape)
    for options in (
        {"mask": torch.zeros(2, 20, dtype=torch.bool)},
        {"row_positions": torch.full((3,), -1)},
        {"row_positions": torch.full((2, 3), -(2**62))},
        {"mask": torch.arange(20).expand(2, 20) > 9, "row_positions": torch.tensor([9, 2, 0])},
    ):
        assert torch.equal(ck.attention_scores(query, keys, per_head=per_head, **options), zero)
    assert torch.equal(ck.attention_scores(query[:, :, :0], keys, per_head=per_head), zero)
    assert ck.attention_scores(query, keys[:, :, :0], per_head=per_head).shape == (*shape[:-1], 0)
    assert ck.attention_scores(query[:0], keys[:0], per_head=per_head).shape == (0, *shape[1:])


# ---- the public function ------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_rule():
    query, keys = problem(2, 4, 2, 3, 20, 8)
    for bad, wrong in ((query[0], keys), (query[:1], keys), (query[..., :4], keys), (query[:, :3], keys)):
        with pytest.raises(ValueError, match=r"where K divides H \(query: \["):
            ck.attention_scores(bad, wrong)
    with pytest.raises(TypeError, match=r"one dtype.*Convert the query"):
        ck.attention_scores(query.half(), keys)
    with pytest.raises(TypeError, match="float64"):
        ck.attention_scores(query.double(), keys.double())
    with pytest.raises(ValueError, match="heads and columns"):
        ck.attention_scores(query[..., :0], keys[..., :0])
    for mask in (torch.ones(2, 20), torch.ones(20, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask must be \[B=2, L=20\] bool.*\.bool\(\)"):
            ck.attention_scores(query, keys, mask=mask)
    for rows in (torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"row_positions must be \[R=3\] or \[B=2, R=3\] int64"):
            ck.attention_scores(query, keys, row_positions=rows)
    for name in ("mask", "row_positions"):
        with pytest.raises(TypeError, match=rf"{name} is a list, it must be a tensor, \[.*\. Wrap it in torch\.tensor"):
            ck.attention_scores(query, keys, **{name: [1, 2]})
    for scale in (math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="finite number"):
            ck.attention_scores(query, keys, scale=scale)


def test_gradients_are_refused(backend):
    query, keys = problem(1, 2, 1, 1, 9, 4)
    for leaf in (query.clone().requires_grad_(), keys.clone().requires_grad_()):
        args = (leaf, keys) if leaf.shape == query.shape else (query, leaf)
        with pytest.raises(RuntimeError, match="has no gradient"):
            ck.attention_scores(*args)
        with torch.no_grad():
            assert torch.equal(ck.attention_scores(*args), ck.attention_scores(query, keys))


def test_autocast_does_not_round_the_products(backend):
    query, keys = problem(1, 4, 2, 3, 60, 32)
    expected = ck.attention_scores(query, keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.attention_scores(query, keys), expected)


def test_op_is_registered_correctly():
    query, keys = problem(2, 4, 2, 3, 20, 8)
    mask, rows = torch.rand(2, 20) < 0.5, torch.randint(0, 20, (2, 3))
    for args in ((None, None, 0.3, False), (mask, rows, 0.3, True)):
        torch.library.opcheck(torch.ops.cacovid.attention_scores.default, (query, keys, *args))


def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(query, keys, mask):
        return ck.attention_scores(query, keys, mask=mask, row_positions=torch.arange(query.shape[2]) + 9)

    for n in (30, 41):
        query, keys = problem(2, 4, 2, 3, n, 8)
        mask = torch.rand(2, n) < 0.8
        expected = ck.attention_scores(query, keys, mask=mask, row_positions=torch.arange(3) + 9)
        assert torch.equal(run(query, keys, mask), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.zeros(2, 4, 3)},
        {"query": torch.zeros(2, 3, 3, 8)},
        {"keys": torch.zeros(2, 2, 20, 8).half()},
        {"keys": torch.zeros(1, 2, 20, 8)},
        {"mask": torch.zeros(2, 19, dtype=torch.bool)},
        {"mask": torch.zeros(2, 20, dtype=torch.uint8)},
        {"row_positions": torch.zeros(2, 3, dtype=torch.int32)},
        {"scores": torch.zeros(2, 19)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_engine_refuses_shapes_that_do_not_fit(change):
    from cacovid_kernels import _C

    args = {
        "query": torch.zeros(2, 4, 3, 8), "keys": torch.zeros(2, 2, 20, 8), "mask": None, "row_positions": None,
        "scale": 1.0, "per_head": False, "threads": 1, "scores": torch.zeros(2, 20),
    }  # fmt: skip
    with pytest.raises(ValueError, match="must"):
        _C.attention_scores(*(args | change).values())
