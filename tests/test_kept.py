"""Selection with the layout and the rows of what it keeps, in one op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cacovid_kernels as ck

GRID = [(4, 3, 5), (1, 2, 2), (6, 1, 7)]
TOKENS, FRAMES = 106, 11


def select(**options):
    scores, frames = torch.randn(TOKENS), torch.randn(FRAMES)
    return ck.select_tokens(scores, frames, GRID, keep_ratio=0.3, **options)


def positions_by_loop(kept: ck.Selection) -> list[list[int]]:
    found, first, at = [], 0, 0
    for (t, h, w), n in zip(kept.grid_thw, kept.lengths, strict=True):
        for index in kept.indices[at : at + n].tolist():
            found.append([(index - first) // (h * w), (index - first) // w % h, (index - first) % w])
        first, at = first + t * h * w, at + n
    return [list(axis) for axis in zip(*found, strict=True)]


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("layout", [False, True])
def test_positions_are_frame_row_and_column(backend, order, layout):
    kept = select(order=order, layout=layout)
    assert kept.positions().tolist() == positions_by_loop(kept)
    assert kept.positions().dtype == torch.int64


def test_the_layout_is_what_a_selection_computes_later(backend):
    torch.manual_seed(3)
    plain = select()
    torch.manual_seed(3)
    kept = select(layout=True)
    assert torch.equal(kept.indices, plain.indices)
    assert torch.equal(kept.frame_counts, plain.frame_counts)
    assert torch.equal(kept.mask(), plain.mask())
    assert torch.equal(kept.positions(), plain.positions())
    assert torch.equal(kept.cu_seqlens, plain.cu_seqlens)
    assert kept.cu_seqlens.dtype == plain.cu_seqlens.dtype == torch.int32
    assert kept.tokens is None


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.bool])
def test_rows_of_the_kept_tokens(backend, order, dtype):
    tokens = torch.randint(0, 2, (7, TOKENS)).to(dtype).t()
    kept = select(tokens=tokens, order=order)
    assert kept.tokens.dtype == dtype
    assert torch.equal(kept.tokens, tokens[kept.indices])


def test_rows_have_a_gradient(backend):
    tokens = torch.randn(TOKENS, 3, dtype=torch.float64, requires_grad=True)

    def rows(x):
        torch.manual_seed(5)
        return select(tokens=x).tokens

    assert torch.autograd.gradcheck(rows, tokens)
    assert torch.autograd.gradgradcheck(rows, tokens)


@given(st.lists(st.tuples(*(st.integers(1, 5),) * 3), min_size=1, max_size=4), st.floats(0.01, 1.0))
def test_random_grids(grid, ratio):
    n = sum(t * h * w for t, h, w in grid)
    scores, tokens = torch.randn(n), torch.randn(n, 2)
    for name in ("cpu", "reference"):
        with ck.use_backend(name):
            kept = ck.select_tokens(scores, None, grid, keep_ratio=ratio, tokens=tokens, layout=True)
        assert kept.positions().tolist() == positions_by_loop(kept)
        assert torch.equal(kept.mask().nonzero().flatten(), kept.indices)
        assert kept.cu_seqlens.diff().tolist() == list(kept.lengths)
        assert torch.equal(kept.tokens, tokens[kept.indices])


def test_the_op_is_well_formed(backend):
    args = (torch.randn(24), torch.randn(2), [2, 3, 4], [7], 0.3, 0.5, None, False, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.cacovid.select_kept.default, (*args, None))
    # The fourth test adds up all results, which integers and floats do not let it.
    tokens = torch.randn(24, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.cacovid.select_kept.default, (*args, tokens), test_utils=tests)


def test_compiles_whole():
    def prompt(scores, tokens):
        kept = ck.select_tokens(scores, grid_thw=[(2, 3, 4)], keep_ratio=0.5, tokens=tokens, layout=True)
        return kept.tokens, kept.positions(), kept.mask(), kept.cu_seqlens

    scores, tokens = torch.randn(24), torch.randn(24, 3, requires_grad=True)
    for found, wanted in zip(
        torch.compile(prompt, fullgraph=True)(scores, tokens), prompt(scores, tokens), strict=True
    ):
        assert torch.equal(found, wanted)
        if found.requires_grad:
            (compiled,), (eager,) = (torch.autograd.grad(x.square().sum(), tokens) for x in (found, wanted))
            assert torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.randn(TOKENS), ValueError, r"tokens must be \[N, D\] with a row for each of the 106 scores"),
        (torch.randn(TOKENS - 1, 2), ValueError, r"each of the 106 scores \(tokens: \[105, 2\]"),
        (torch.randn(TOKENS, 2, dtype=torch.complex64), TypeError, "neither complex"),
        (torch.empty(TOKENS, 2, device="meta"), ValueError, "meta"),
        ([1.0] * TOKENS, TypeError, "must be a strided tensor"),
    ],
)
def test_wrong_tokens_are_refused(tokens, error, message):
    with pytest.raises(error, match=message) as caught:
        select(tokens=tokens)
    assert "\n" not in str(caught.value)


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        tokens = torch.autograd.forward_ad.make_dual(torch.randn(TOKENS, 2), torch.randn(TOKENS, 2))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            select(tokens=tokens)
