"""Attention scores in Triton against the CPU engine, and against themselves in other batches and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.triton import attention

# B, H, K, R, L, D: one of each; rows, keys and columns that fill no tile; blocks of rows; columns of two steps.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 3, 50, 8),
    (2, 14, 2, 5, 133, 40),
    (3, 3, 3, 4, 64, 16),
    (1, 2, 1, 35, 70, 16),
    (1, 2, 2, 2, 65, 150),
]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(attention, "PART", attention.MANY.keys)  # as prompts of tens of thousands of keys have


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names, launch = [], attention.launch

    def counted(kernel, *args, **options):
        names.append(kernel.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(attention, "launch", counted)
    return names


def problem(b, h, k, r, n, d, dtype=torch.float32):
    return torch.randn(b, h, r, d).to(dtype), torch.randn(b, k, n, d).to(dtype)


def check(query, keys, rtol=2e-5, **options):
    found = ck.attention_scores(query, keys, **options)
    with ck.use_backend("cpu"):
        wanted = ck.attention_scores(query, keys, **options)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-8, equal_nan=True)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_cpu_engine(shape):
    query, keys = problem(*shape)
    b, r, n = shape[0], shape[3], shape[4]
    check(query, keys)
    check(query, keys, mask=torch.rand(b, n) < 0.7, per_head=True)
    check(query, keys, row_positions=torch.randint(-1, n, (b, r)), scale=0.7)
    check(query, keys, mask=torch.rand(b, n) < 0.7, row_positions=torch.randint(0, n, (r,)))


def test_float16():
    """Not bfloat16, which the interpreter cannot multiply."""
    query, keys = problem(2, 4, 2, 3, 80, 32, torch.float16)
    check(query, keys, row_positions=torch.tensor([3, 70, 79]))


def test_more_parts_than_are_kept_apart(monkeypatch):
    monkeypatch.setattr(attention, "PARTS", 2)
    query, keys = problem(1, 2, 1, 2, 300, 8)
    check(query, keys, row_positions=torch.tensor([299, 140]))


def test_a_later_part_may_hold_the_largest_or_nothing():
    query, keys = problem(1, 2, 1, 2, 200, 8)
    keys[:, :, 150] = 40 * query[:, :1, 0]
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[:, 64:128] = False
    check(query, keys, mask=mask, row_positions=torch.tensor([10, 199]))
    mask[:, :128] = False
    check(query, keys, mask=mask)


@pytest.mark.parametrize("layout", ["transposed", "heads", "sliced"])
def test_layouts(layout):
    query, keys = problem(2, 4, 2, 3, 70, 24)
    mask, rows = torch.rand(2, 70) < 0.8, torch.randint(0, 70, (2, 3))
    view = {
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.nn.functional.pad(x, (3, 2), value=math.nan)[..., 3:-2],
    }[layout]
    found = ck.attention_scores(
        view(query), view(keys), mask=torch.stack([mask, ~mask], -1)[..., 0], row_positions=rows.t().contiguous().t()
    )
    assert torch.equal(found, ck.attention_scores(query, keys, mask=mask, row_positions=rows))


@pytest.mark.parametrize("per_head", [False, True])
def test_batch_mates_change_no_bit(per_head):
    query, keys = problem(3, 4, 2, 3, 90, 16)
    mask, rows = torch.rand(3, 90) < 0.8, torch.randint(-1, 90, (3, 3))
    found = ck.attention_scores(query, keys, mask=mask, row_positions=rows, per_head=per_head)
    for b in range(3):
        one = slice(b, b + 1)
        alone = ck.attention_scores(
            query[one], keys[one], mask=mask[one], row_positions=rows[one], per_head=per_head
        )  # fmt: skip
        assert torch.equal(found[one], alone)


def test_padding_changes_roundings_alone():
    query, keys = problem(1, 4, 2, 3, 90, 16)
    mask = torch.arange(90)[None] >= 37
    padded = ck.attention_scores(query, keys, mask=mask, row_positions=torch.tensor([87, 88, 89]))
    alone = ck.attention_scores(query, keys[:, :, 37:], row_positions=torch.tensor([50, 51, 52]))
    torch.testing.assert_close(padded[:, 37:], alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 69])
def test_odd_values(bad, place):
    query, keys = problem(2, 2, 1, 2, 70, 8)
    query = query.abs() + 0.1
    keys[0, 0, place, 2] = bad
    found = check(query, keys, row_positions=torch.tensor([3, 60]))
    assert not found[1].isnan().any()
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, place] = False
    assert not check(query, keys, mask=mask).isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_one_odd_value_alone(bad):
    query, keys = torch.ones(1, 2, 2, 4), torch.randn(1, 1, 70, 4)
    keys[:, :, :10] = bad
    found = check(query, keys, row_positions=torch.tensor([9, -1]))
    assert found[0, :10].isnan().all()
    assert not found[0, 10:].any()


@pytest.mark.parametrize("per_head", [False, True])
def test_where_nothing_is_seen_scores_are_zero(per_head):
    query, keys = problem(2, 4, 2, 3, 70, 8)
    for options in (
        {"mask": torch.zeros(2, 70, dtype=torch.bool)},
        {"row_positions": torch.full((3,), -1)},
        {"mask": torch.arange(70).expand(2, 70) > 9, "row_positions": torch.tensor([9, 2, 0])},
    ):
        assert not check(query, keys, per_head=per_head, **options).any()
    assert not ck.attention_scores(query[:, :, :0], keys, per_head=per_head).any()
    assert ck.attention_scores(query, keys[:, :, :0]).shape == (2, 0)
    assert ck.attention_scores(query[:0], keys[:0]).shape == (0, 70)


def test_two_launches_and_nothing_read_on_the_host(launches):
    class NoHostReads(TorchDispatchMode):
        """Fails where values would have to come to the host."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "index"), name
            return func(*args, **(kwargs or {}))

    query, keys = problem(2, 4, 2, 3, 70, 8)
    mask, rows = torch.rand(2, 70) < 0.8, torch.randint(0, 70, (2, 3))
    with NoHostReads():
        attention.attention_scores(query, keys, mask, rows, 0.5, False)
    assert launches == ["_statistics_kernel", "_scores_kernel"]
