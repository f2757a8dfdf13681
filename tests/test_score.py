"""The score family: frame_pool against its oracle, score_tokens against the unfolded network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import _backend
from cacovid_kernels.ops import score
from cacovid_kernels.reference import score as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [[(1, 1, 1)], [(2, 3, 3)], [(4, 1, 4), (1, 5, 1)], [(3, 2, 7), (1, 1, 2), (5, 3, 1)]]
needs_engine = pytest.mark.skipif(bool(ck.backends()["cpu"]), reason=ck.backends()["cpu"])


def tokens_of(grid):
    return sum(t * h * w for t, h, w in grid)


def flatten(grid):
    return [n for video in grid for n in video]


def frame_pool(x, grid, eps=1e-6, backend="cpu"):
    with ck.use_backend(backend):
        return score._frame_pool(x, flatten(grid), eps)


def strided(x, layout):
    """The values of x in another memory layout."""
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((x.shape[0] * 2, x.shape[1] + 5), torch.nan, dtype=x.dtype)
        wide[::2, 3:-2] = x
        return wide[::2, 3:-2]
    wide = torch.full((x.shape[0], x.shape[1], 3), torch.nan, dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


@needs_engine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("columns", [1, 15, 16, 100])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "spread"])
def test_frame_pool_equals_reference(dtype, grid, columns, layout):
    torch.manual_seed(columns)
    x = (torch.randn(tokens_of(grid), columns) * 3).to(dtype)
    rrms, mean = frame_pool(strided(x, layout), grid)
    expected_rrms, expected_mean = reference.frame_pool(x, flatten(grid), 1e-6)
    torch.testing.assert_close(rrms, expected_rrms, rtol=2e-6, atol=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=2e-6)
    straight = frame_pool(x, grid)
    assert torch.equal(rrms, straight[0])
    assert torch.equal(mean, straight[1])


@needs_engine
@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_pool_has_the_same_bits_for_every_thread_count(dtype):
    grid = [(9, 7, 7), (3, 20, 30), (1, 1, 1)]
    x = torch.randn(tokens_of(grid), 130).to(dtype)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(frame_pool(x, grid))
    finally:
        torch.set_num_threads(before)
    for rrms, mean in answers[1:]:
        assert torch.equal(rrms, answers[0][0])
        assert torch.equal(mean, answers[0][1])


@needs_engine
def test_frame_pool_has_the_same_bits_on_every_instruction_set():
    program = (
        "import torch; from cacovid_kernels.native.score import frame_pool; torch.manual_seed(0);"
        "x = torch.randn(2 * 15, 75);"
        "out = [y for d in (x, x.half(), x.bfloat16()) for y in frame_pool(d, [2, 3, 5], 1e-6)];"
        "print(torch.cat([y.flatten() for y in out]).view(torch.int32).tolist())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "CACOVID_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("baseline", "avx2", "avx512")
    }
    assert len(answers) == 1


@needs_engine
def test_frame_pool_of_a_frame_ignores_its_batch():
    x = torch.randn(3 * 12, 40)
    rrms, mean = frame_pool(x, [(1, 3, 4)] * 3)
    for f in range(3):
        alone = frame_pool(x[12 * f : 12 * f + 12], [(1, 3, 4)])
        assert torch.equal(alone[0], rrms[12 * f : 12 * f + 12])
        assert torch.equal(alone[1], mean[f : f + 1])


@needs_engine
@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_pool_converts_every_value_of_the_type(dtype):
    if dtype is torch.float32:
        values = torch.tensor([0.0, -0.0, 1e-40, 3e-39, 1.5, -2.5e30, torch.inf, torch.nan]).repeat(4)
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for x in (values[:, None], values.reshape(-1, 16)):
        rrms, mean = frame_pool(x, [(x.shape[0], 1, 1)])
        expected = x.float()
        torch.testing.assert_close(mean, expected, rtol=0, atol=0, equal_nan=True)
        expected_rrms = torch.rsqrt(expected.square().mean(1) + 1e-6)
        torch.testing.assert_close(rrms, expected_rrms, rtol=2e-6, atol=0, equal_nan=True)


@needs_engine
@pytest.mark.parametrize(
    ("x", "grid"),
    [
        (torch.zeros(5, 4), [2, 1, 2]),
        (torch.zeros(4), [2, 1, 2]),
        (torch.zeros(4, 4, dtype=torch.float64), [2, 1, 2]),
        (torch.zeros(4, 4), [2, 0, 2]),
        (torch.zeros(4, 4), [2, 1]),
    ],
)
def test_engine_refuses_shapes_that_do_not_fit(x, grid):
    from cacovid_kernels import _C

    with pytest.raises(ValueError, match="must"):
        _C.frame_pool(x, grid, 1e-6, 1, torch.empty(4), torch.empty(2, 4))


def make_heads(size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    token_head, frame_head = ck.PolicyHead(size), ck.PolicyHead(size)
    for p in [*token_head.parameters(), *frame_head.parameters()]:
        # Gains near one, so that scores spread as those of a trained policy do.
        torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1)
    weight = torch.rand(size) + 0.5
    return token_head.to(dtype), frame_head.to(dtype), weight.to(dtype)


def unfolded(rows, head, weight, eps, dtype):
    """The published formula in the given arithmetic."""
    layers = [(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in head.linears]
    wide = rows.float()
    x = weight.to(dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)
    for w, b in layers[:-1]:
        x = torch.nn.functional.silu(torch.nn.functional.linear(x, w, b))
    logits = torch.nn.functional.linear(x, *layers[-1]).float()
    return logits[:, 1] - logits[:, 0]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_engine)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_error_is_at_most_twice_that_of_torch(backend, dtype, scale):
    grid = [(40, 5, 5), (24, 4, 8)]
    token_head, frame_head, weight = make_heads(512, dtype)
    hidden = (torch.randn(tokens_of(grid), 512) * scale).to(dtype)
    with torch.no_grad(), ck.use_backend(backend):
        tokens, frames = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight, eps=1e-6)
    assert tokens.dtype == frames.dtype == torch.float32
    wide = reference.frame_pool(hidden, flatten(grid), 1e-6)[1]
    narrow = torch.cat([v.reshape(t, h * w, -1).mean(1) for v, (t, h, w) in zip(
        hidden.split([t * h * w for t, h, w in grid]), grid, strict=True)])  # fmt: skip
    for mine, head, exact, published in [
        (tokens, token_head, hidden, hidden),
        (frames, frame_head, wide, narrow),
    ]:
        with torch.no_grad():
            truth = unfolded(exact, head, weight, 1e-6, torch.float32)
            theirs = unfolded(published, head, weight, 1e-6, dtype)
        for error in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            assert error(mine - truth) <= 2 * error(theirs - truth) + 1e-5


def test_folded_and_differentiable_paths_agree():
    grid = [(3, 4, 4)]
    token_head, frame_head, weight = make_heads(64)
    hidden = torch.randn(48, 64)
    with_grad = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight)
    with torch.no_grad():
        without = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight)
    for a, b in zip(with_grad, without, strict=True):
        assert a.requires_grad
        assert not b.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_stale_weights_after_a_step():
    token_head, _, weight = make_heads(32)
    hidden = torch.randn(6, 32)
    with torch.no_grad():
        before, _ = ck.score_tokens(hidden, token_head, norm_weight=weight)
        token_head.linears[0].weight.mul_(1.5)
        after, _ = ck.score_tokens(hidden, token_head, norm_weight=weight)
        fresh = unfolded(hidden, token_head, weight, 1e-6, torch.float32)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_input():
    grid = [(2, 2, 3)]
    token_head, frame_head, weight = make_heads(16)
    heads = [*token_head.parameters(), *frame_head.parameters()]
    hidden = torch.randn(12, 16, requires_grad=True)
    weight.requires_grad_()
    tokens, frames = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight)
    (tokens.square().sum() + frames.square().sum()).backward()
    for x in (hidden, weight, *heads):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    step = 1e-2
    direction = torch.randn_like(hidden)
    direction /= direction.norm()

    def loss(x):
        with torch.no_grad():
            t, f = ck.score_tokens(x, token_head, frame_head, grid, norm_weight=weight)
        return (t.double().square().sum() + f.double().square().sum()).item()

    numeric = (loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step)
    assert numeric == pytest.approx((hidden.grad * direction).sum().item(), rel=2e-2, abs=1e-4)


def test_dense_and_packed_hidden_mean_the_same():
    token_head, frame_head, weight = make_heads(32)
    dense = torch.randn(2, 3, 8, 32)
    with torch.no_grad():
        packed = ck.score_tokens(dense.reshape(48, 32), token_head, frame_head, [(3, 2, 4)] * 2, norm_weight=weight)
        batch = ck.score_tokens(dense, token_head, frame_head, norm_weight=weight)
        video = ck.score_tokens(dense[0], token_head, frame_head, norm_weight=weight)
    assert torch.equal(packed[0], batch[0])
    assert torch.equal(packed[1], batch[1])
    torch.testing.assert_close(video[0], batch[0][:24])
    torch.testing.assert_close(video[1], batch[1][:3])


def test_without_a_frame_head_no_grid_is_needed():
    token_head, frame_head, weight = make_heads(32)
    hidden = torch.randn(12, 32)
    with torch.no_grad():
        tokens, frames = ck.score_tokens(hidden, token_head, norm_weight=weight)
        both, _ = ck.score_tokens(hidden, token_head, frame_head, [(3, 2, 2)], norm_weight=weight)
    assert frames is None
    torch.testing.assert_close(tokens, both)


def test_errors_name_the_argument_and_the_rule():
    token_head, frame_head, weight = make_heads(32)
    x = torch.randn(12, 32)
    with pytest.raises(ValueError, match=r"one row for each of the 18 tokens of grid_thw=\[\(2, 3, 3\)\]"):
        ck.score_tokens(x, token_head, frame_head, [(2, 3, 3)], norm_weight=weight)
    with pytest.raises(ValueError, match="grid_thw is needed"):
        ck.score_tokens(x, token_head, frame_head, norm_weight=weight)
    with pytest.raises(ValueError, match="D=32"):
        ck.score_tokens(x[:, :16], token_head, norm_weight=weight)
    with pytest.raises(ValueError, match=r"norm_weight: \[16\]"):
        ck.score_tokens(x, token_head, norm_weight=weight[:16])
    with pytest.raises(TypeError, match=r"norm_weight is a NoneType, it must be a tensor, \[D\]\. Wrap"):
        ck.score_tokens(x, token_head, norm_weight=None)
    with pytest.raises(TypeError, match="like the weights"):
        ck.score_tokens(x.bfloat16(), token_head, norm_weight=weight)
    with pytest.raises(TypeError, match="float64"):
        ck.score_tokens(x.double(), token_head, norm_weight=weight)
    with pytest.raises(ValueError, match="outputs=3 must be 2"):
        ck.PolicyHead(32, outputs=3).folded()
    with pytest.raises(ValueError, match="size=8 must be >= 16"):
        ck.PolicyHead(8)


def test_op_is_registered_correctly():
    x = torch.randn(12, 20)
    torch.library.opcheck(torch.ops.cacovid.frame_pool.default, (x, [2, 2, 3], 1e-6))
    head = make_heads(20)[0].requires_grad_(False).folded()
    for rrms in (None, torch.rand(12)):
        args = (x, rrms, list(head.weights), list(head.biases), head.vector, head.offset)
        torch.library.opcheck(torch.ops.cacovid.head_scores.default, args)


def test_folded_head_refuses_gradients():
    head = make_heads(16)[0].folded()
    with pytest.raises(RuntimeError, match="has no gradient"):
        head(torch.randn(3, 16))
    with torch.no_grad():
        assert head(torch.randn(3, 16)).shape == (3,)


def test_score_tokens_compiles_without_a_graph_break():
    token_head, frame_head, weight = make_heads(32)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x):
        return ck.score_tokens(x, token_head, frame_head, norm_weight=weight)

    with torch.no_grad():
        for frames in (2, 3):
            x = torch.randn(frames, 6, 32)
            expected = ck.score_tokens(x, token_head, frame_head, norm_weight=weight)
            for mine, theirs in zip(run(x), expected, strict=True):
                torch.testing.assert_close(mine, theirs)


def test_all_backends_but_cuda_offer_the_family():
    for package in (package for name, package in _backend.PACKAGES.items() if name != "cuda"):
        module = __import__(f"{package}.score", fromlist=["frame_pool"])
        assert callable(module.frame_pool)
        assert callable(module.head_scores)
