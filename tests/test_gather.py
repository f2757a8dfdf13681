"""gather_tokens: every dtype, stride and index; layouts; gradients; preallocated results; errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cacovid_kernels as ck
from cacovid_kernels._bits import as_bits
from cacovid_kernels.ops import gather

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((20,), 0),
    ((20, 9), 0),
    ((3, 20), 1),
    ((20, 64), 0),
    ((2, 20, 33), 1),
    ((3, 2, 20, 4), 2),
    ((20, 2, 3), 0),
]
INDICES = {
    "empty": torch.empty(0, dtype=torch.int64),
    "one": torch.tensor([7]),
    "scalar": torch.tensor(3),
    "all": torch.arange(20),
    "duplicates": torch.tensor([5, 5, 0, 19, 5, 0]),
    "padding": torch.tensor([[-1, 3, 4], [8, -1, -1]]),
    "outside": torch.tensor([20, -2, 2**62, -(2**63), 1]),
    "int32": torch.tensor([[[4, -1], [19, 20]]], dtype=torch.int32),
    "strided": torch.arange(60).view(20, 3)[::4, 0],
}
needs_engine = pytest.mark.skipif(bool(ck.backends()["cpu"]), reason=ck.backends()["cpu"])


def random_bits(shape, dtype, seed=0):
    """A tensor of random bytes, so that NaN payloads and -0 are among the values."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.zeros((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


def same(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def layouts(x):
    """The values of x in several memory layouts, with garbage between and around them."""
    yield x
    order = torch.randperm(x.dim()).tolist()
    yield x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
    wide = random_bits([2 * n + 3 for n in x.shape], x.dtype, seed=1)
    view = wide[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    view.copy_(x)
    yield view
    offset = random_bits([x.numel() + 1], x.dtype, seed=2)[1:].view(x.shape)
    yield offset.copy_(x)


def expected(x, index, dim):
    """One Python step per row."""
    rows = [
        x.select(dim, int(i)) if 0 <= i < x.shape[dim] else torch.zeros_like(x.select(dim, 0))
        for i in index.reshape(-1).tolist()
    ]
    if not rows:
        return x.new_empty(x.shape[:dim] + index.shape + x.shape[dim + 1 :])
    stacked = torch.stack([as_bits(r) for r in rows], dim).view(x.dtype)
    return stacked.reshape(x.shape[:dim] + index.shape + x.shape[dim + 1 :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_copied_bit_for_bit(backend, dtype):
    for shape, dim in SHAPES:
        for x in layouts(random_bits(shape, dtype)):
            for name, index in INDICES.items():
                (result,) = gather._gather_rows([x], index, [dim])
                assert result.is_contiguous()
                assert same(result, expected(x, index, dim)), (shape, x.stride(), name)


def test_broadcast_and_empty_tensors(backend):
    row = torch.arange(20.0)
    assert same(gather._gather_rows([row.expand(4, 20)], INDICES["padding"], [1])[0],
                expected(row.expand(4, 20), INDICES["padding"], 1))  # fmt: skip
    for shape, dim in [((0, 5), 0), ((4, 0), 0), ((0, 4, 5), 1), ((4, 5, 0), 1)]:
        (result,) = gather._gather_rows([torch.ones(shape)], torch.tensor([0, -1, 3]), [dim])
        assert result.shape == (*shape[:dim], 3, *shape[dim + 1 :])
        assert not result.any()
    assert ck.gather_tokens([], torch.tensor([1])) == []
    assert ck.gather_tokens({"mask": None}, torch.tensor([1])) == {"mask": None}


@needs_engine
@pytest.mark.parametrize("columns", [3584, 3585, 100])
def test_results_beyond_the_caches(threads, columns):
    # 9 MB and more: streaming stores where rows are whole lines, ordinary ones elsewhere.
    x = random_bits((700, columns), torch.int32)
    index = torch.randint(-2, 702, (9_500_000 // (4 * columns),))
    with ck.use_backend("reference"):
        (wanted,) = gather._gather_rows([x], index, [0])
    assert same(gather._gather_rows([x], index, [0])[0], wanted)


@needs_engine
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = """
import torch
import cacovid_kernels as ck
from cacovid_kernels.ops import gather
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for columns in (1, 2, 5, 16, 48, 100, 1200):
        torch.manual_seed(columns)
        x, index = torch.randn(50, columns).to(dtype), torch.randint(-1, 51, (70,))
        for rows in (x, torch.randn(50, 2 * columns).to(dtype)[:, ::2]):
            ours = gather._gather_rows([rows], index, [0])[0]
            sums = gather._scatter_rows([ours], index, [50], [0])[0]
            with ck.use_backend("reference"):
                assert torch.equal(ours, gather._gather_rows([rows], index, [0])[0])
                assert torch.equal(sums, gather._scatter_rows([ours], index, [50], [0])[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CACOVID_CPU_ISA": isa})


@pytest.fixture
def ragged():
    """Three videos of different shapes and what was selected of them."""
    torch.manual_seed(3)
    grid = [(3, 2, 4), (1, 3, 3), (4, 1, 5)]
    tokens = sum(t * h * w for t, h, w in grid)
    return ck.select_tokens(torch.randn(tokens), torch.randn(8), grid, keep_ratio=0.4), tokens


def test_layouts_of_a_ragged_batch(backend, ragged):
    kept, n = ragged
    x, positions = torch.randn(n, 6), torch.arange(3 * n).view(3, n)
    packed = ck.gather_tokens({"x": x, "positions": positions}, kept)
    assert torch.equal(packed["x"], x[kept.indices])
    assert torch.equal(packed["positions"], positions[:, kept.indices])
    longest = max(kept.lengths)
    for side in ("left", "right"):
        padded = ck.gather_tokens(
            {
                "x": x,
                "positions": positions,
                "labels": torch.arange(n),
                "mask": torch.ones(n, dtype=torch.bool),
            },
            kept,
            layout=f"padded_{side}",
            pad_value={"positions": 1, "labels": -100},
        )
        assert padded["x"].shape == (3, longest, 6)
        assert padded["positions"].shape == (3, 3, longest)
        assert padded["mask"].sum(1).tolist() == list(kept.lengths)
        assert torch.equal(padded["x"][padded["mask"]], packed["x"])
        assert torch.equal(padded["positions"][:, padded["mask"]], packed["positions"])
        assert not padded["x"][~padded["mask"]].any()
        assert (padded["positions"][:, ~padded["mask"]] == 1).all()
        assert (padded["labels"][~padded["mask"]] == -100).all()
        for b, length in enumerate(kept.lengths):
            row = padded["mask"][b]
            assert row[-length:].all() if side == "left" else row[:length].all()


def test_token_axes_are_found():
    grid = [(2, 3, 4)] * 2
    kept = ck.select_tokens(torch.randn(48), grid_thw=grid, keep_ratio=0.25)
    flat = torch.randn(48, 5)
    wanted = flat[kept.indices]
    for shape in [(48, 5), (2, 24, 5), (4, 12, 5), (2, 2, 12, 5)]:
        assert torch.equal(ck.gather_tokens(flat.view(shape), kept), wanted)
    assert torch.equal(ck.gather_tokens(flat.view(1, 2, 24, 5), kept), wanted[None])
    assert torch.equal(ck.gather_tokens(flat.t(), kept), wanted.t())
    positions = torch.arange(72).view(3, 1, 24).expand(3, 2, 24)
    assert torch.equal(ck.gather_tokens(positions, kept), positions.flatten(1)[:, kept.indices])
    crowded = torch.randn(2, 30, 5)[:, 3:27]  # cannot be viewed as one axis
    assert torch.equal(ck.gather_tokens(crowded, kept), crowded.flatten(0, 1)[kept.indices])
    assert torch.equal(ck.gather_tokens(flat.t(), kept.indices, dim=-1), wanted.t())
    square = torch.randn(48, 48)
    assert torch.equal(ck.gather_tokens(square, kept, dim=1), square[:, kept.indices])
    pair = ck.gather_tokens([square, square], kept, dim=[0, 1])
    assert torch.equal(pair[0], square[kept.indices])
    assert torch.equal(pair[1], square[:, kept.indices])


def test_prompts_keep_what_is_no_video_token():
    kept = ck.select_tokens(torch.randn(24), grid_thw=[(1, 3, 4)] * 2, keep_ratio=0.25)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 2:14] = mask[1, 5:17] = True
    prompt = kept.within(mask)
    tensors = {"ids": torch.arange(40).view(2, 20), "rope": torch.arange(120).view(3, 2, 20)}
    result = ck.gather_tokens(tensors, prompt, layout="padded_left")
    assert result["ids"].shape == (2, 11)
    assert torch.equal(result["ids"], tensors["ids"].flatten()[prompt.indices].view(2, 11))
    assert torch.equal(result["rope"], tensors["rope"].flatten(1)[:, prompt.indices].view(3, 2, 11))


def test_structure_is_kept():
    x = torch.arange(12.0).view(4, 3)
    tree = {"a": x, "layers": [x, (x, None)], "none": None}
    result = ck.gather_tokens(tree, torch.tensor([2, 0]))
    assert list(result) == ["a", "layers", "none"]
    assert isinstance(result["layers"][1], tuple)
    assert result["layers"][1][1] is None
    assert torch.equal(result["layers"][1][0], x[[2, 0]])
    assert torch.equal(ck.gather_tokens(x, torch.tensor([1])), x[[1]])
    assert isinstance(ck.gather_tokens((x,), torch.tensor([1])), tuple)
    padded = ck.gather_tokens([x, x], torch.tensor([-1, 1]), pad_value=7)
    assert padded[1][0].tolist() == [7, 7, 7]


def test_combinations_read_one_copy():
    code = """
import resource, sys
import torch
import cacovid_kernels as ck
x = torch.ones(4000, 1024)
index = torch.randint(0, 4000, (64, 4))
ck.gather_tokens(x, index)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = ck.gather_tokens(x, index)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert result.shape == (64, 4, 1024)
assert grown < 64 << 10, grown  # a repeat would take 1 GiB
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    x = torch.randn(30, 4)
    index = torch.stack([torch.randperm(30)[:5].sort().values for _ in range(7)])
    assert torch.equal(ck.gather_tokens(x, index), x[index])
    assert torch.equal(ck.gather_tokens(x[None], index, dim=1), x[index][None])
    grid = [(3, 2, 4), (2, 3, 3)]
    drawn = ck.sample_combinations(torch.randn(42), None, grid, num_samples=5, keep_ratio=0.2, seed=0)
    prompt = {"x": torch.randn(42, 4), "positions": torch.arange(126).view(3, 42)}
    result = ck.gather_tokens(prompt, drawn)
    assert torch.equal(result["x"], prompt["x"][drawn.indices])
    assert torch.equal(result["positions"], prompt["positions"][:, drawn.indices])


@pytest.mark.parametrize("name", ["duplicates", "padding", "outside", "empty", "int32", "scalar"])
def test_gradients(backend, name):
    index = INDICES[name]
    a = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(20)

    def call(a, b):
        result = ck.gather_tokens([a, b, ids], index, dim=[0, 1, 0])
        return result[0], result[1]

    assert torch.autograd.gradcheck(call, (a, b))
    assert torch.autograd.gradgradcheck(call, (a, b))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_follow_the_stated_order(backend, dtype):
    # In ascending position the 1 is lost in float32: 1e8 + 1 - 1e8 = 0; any other order gives 1.
    big = 2.0**60 if dtype is torch.float64 else 2.0**14 if dtype is torch.float16 else 1e8
    one = 2.0**-12 if dtype is torch.float16 else 1.0
    grads = torch.tensor([[big], [one], [-big], [one]], dtype=dtype)
    sums = gather._scatter_rows([grads], torch.tensor([2, 2, 2, 0]), [4], [0])[0]
    assert sums.flatten().tolist() == [one, 0.0, 0.0, 0.0]
    # 256 + 1 + 1 is lost in bfloat16 and 2048 + 1 + 1 in float16: sums must be wider than the storage.
    base = {torch.bfloat16: 256.0, torch.float16: 2048.0}.get(dtype, 1.0)
    grads = torch.tensor([base, 1.0, 1.0], dtype=dtype)
    assert gather._scatter_rows([grads], torch.tensor([1, 1, 1]), [3], [0])[0].tolist() == [
        0.0,
        base + 2,
        0.0,
    ]


@needs_engine
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_have_the_same_bits_for_every_thread_count(threads, dtype):
    torch.manual_seed(0)
    index = torch.randint(-1, 300, (40, 100), dtype=torch.int32)
    grads = [(torch.randn(40, 100, 70) * 100).to(dtype), (torch.randn(3, 40, 100) * 100).to(dtype)]
    sums = gather._scatter_rows(grads, index, [300, 301], [0, 1])
    with ck.use_backend("reference"):
        wanted = gather._scatter_rows(grads, index, [300, 301], [0, 1])
    assert all(same(a, b) for a, b in zip(sums, wanted, strict=True))


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_round_to_nearest_even(dtype):
    # Sums of two cover ties, subnormals and the overflow to infinity.
    halves = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    halves = halves[torch.isfinite(halves)]
    tiny = torch.full_like(halves, torch.finfo(dtype).smallest_normal / 64)
    for other in (halves.flip(0), tiny, halves.roll(1)):
        grads = torch.stack([halves, other])
        ours = gather._scatter_rows([grads], torch.tensor([0, 0]), [1], [0])[0][0]
        assert same(ours, (halves.float() + other.float()).to(dtype))


def test_only_what_needs_a_gradient_gets_one():
    a, b, c = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2), torch.randn(5, requires_grad=True)
    result = ck.gather_tokens({"a": a, "b": b, "c": c}, torch.tensor([4, 4, -1]))
    assert not result["b"].requires_grad
    (result["a"].sum() + 0 * result["b"].sum()).backward()
    assert a.grad[:, 0].tolist() == [0, 0, 0, 0, 2]
    assert b.grad is None
    assert c.grad is None


def test_padding_has_no_gradient():
    x = torch.ones(3, requires_grad=True)
    result = ck.gather_tokens(x, torch.tensor([0, -1, 2]), pad_value=5)
    assert result.tolist() == [1, 5, 1]
    result.sum().backward()
    assert x.grad.tolist() == [1, 0, 1]


def test_preallocated_results(backend, ragged):
    kept, n = ragged
    tensors = {"x": torch.randn(n, 4), "ids": torch.arange(n)}
    k = sum(kept.lengths)
    out = {"x": torch.full((k, 9), -1.0)[:, 2:6], "ids": torch.zeros(k, dtype=torch.int64)}
    version = out["ids"]._version
    assert ck.gather_tokens(tensors, kept, out=out) is out
    assert out["ids"]._version > version  # autograd must notice
    assert torch.equal(out["x"], tensors["x"][kept.indices])
    assert torch.equal(out["ids"], tensors["ids"][kept.indices])
    padded = torch.full((3, max(kept.lengths)), 5)
    ck.gather_tokens(tensors["ids"], kept, layout="padded_left", pad_value=-100, out=padded)
    assert (padded == -100).sum() == padded.numel() - k


def test_errors_of_preallocated_results():
    x, index = torch.randn(6, 4), torch.tensor([1, 2])
    for out, message in [
        (torch.empty(3, 4), r"out must be \[2, 4\] float32 cpu, is \[3, 4\]"),
        (torch.empty(2, 4, dtype=torch.float64), "out must be"),
        ([torch.empty(2, 4)] * 2, "out holds 2 tensors for 1"),
        (x[2:4], "shares memory"),
        (torch.empty(1, 4).expand(2, 4), "shares memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ck.gather_tokens(x, index, out=out)
    one = torch.empty(4, 4)
    with pytest.raises(ValueError, match="another output"):
        ck.gather_tokens([x, x], index, out=[one[:2], one[1:3]])
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        ck.gather_tokens(x, index, out=torch.empty(2, 4))
    with torch.no_grad():
        ck.gather_tokens(x, index, out=torch.empty(2, 4))


def test_errors(ragged):
    kept, n = ragged
    x, index = torch.randn(6, 4), torch.tensor([1, 2])
    for error, message, call in [
        (TypeError, r"selection is a list, .* Wrap a list of positions", lambda: ck.gather_tokens(x, [1, 2])),
        (TypeError, r"must be int64 or int32 .*\[6\] bool cpu", lambda: ck.gather_tokens(x, x[:, 0] > 0)),
        (TypeError, r"neither complex", lambda: ck.gather_tokens(torch.zeros(6) * 1j, index)),
        (TypeError, r"must be strided", lambda: ck.gather_tokens(x.to_sparse(), index)),
        (TypeError, r"tensors\['a'\] is a str", lambda: ck.gather_tokens({"a": "b"}, index)),
        (ValueError, r"layout='dense' must be one of", lambda: ck.gather_tokens(x, index, layout="dense")),
        (ValueError, r"layout='padded_left' needs a Selection",
         lambda: ck.gather_tokens(x, index, layout="padded_left")),
        (ValueError, rf"no axis of tensors\['x'\] has the {n} tokens .*\[6, 4\] float32 cpu",
         lambda: ck.gather_tokens({"x": x}, kept)),
        (ValueError, r"dim=2 is no axis", lambda: ck.gather_tokens(x, index, dim=2)),
        (ValueError, r"no axis", lambda: ck.gather_tokens(torch.tensor(1.0), index)),
        (ValueError, r"no axis of tensors\[1\] has the 6", lambda: ck.gather_tokens([x, x[:5]], index)),
        (ValueError, r"is on cpu but tensors on meta", lambda: ck.gather_tokens(x.to("meta"), index)),
        (IndexError, r"the index holds 6, it must be -1 \(padding\) or in \[0, 6\)",
         lambda: ck.gather_tokens(x, torch.tensor([0, 6]), check="raise")),
        (IndexError, r"holds -2,", lambda: ck.gather_tokens(x, torch.tensor([0, -2]), check="raise")),
    ]:  # fmt: skip
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    ck.gather_tokens(x, torch.tensor([0, -1, 5]), check="raise")


def test_nothing_is_read_on_the_host():
    """On meta tensors every host read is an error, inside an op too, where no dispatch mode looks."""
    with ck.use_backend("reference"):
        kept = ck.select_tokens(torch.zeros(6, 8, device="meta"), keep_ratio=0.4)
        x, ids = torch.zeros(48, 3, device="meta", requires_grad=True), torch.zeros(48, device="meta")
        padded = ck.gather_tokens([x, ids], kept, layout="padded_left", pad_value=-100)
        padded[0].sum().backward()
        out = torch.zeros(19, device="meta")
        assert ck.gather_tokens(ids, kept, pad_value=1, out=out) is out
    assert padded[0].shape == (1, 19, 3)
    assert x.grad.shape == x.shape


def samples():
    index = torch.tensor([[3, -1, 3], [0, 9, 2]])
    a = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 8, requires_grad=True)
    grads = [
        torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 2, 3, requires_grad=True),
    ]
    yield gather._gather_rows, ([a, b, torch.arange(8)], index, [0, 1, 0])
    yield gather._scatter_rows, (grads, index, [8, 8], [0, 1])
    plain = [a.detach(), torch.arange(8)]
    yield (
        gather._gather_rows_out,
        (plain, index, [0, 0], [torch.zeros(2, 3, 2).double(), torch.zeros(2, 3).long()]),
    )


@pytest.mark.parametrize("sample", list(samples()), ids=lambda s: s[0].name)
def test_opcheck(sample):
    op, args = sample
    torch.library.opcheck(op.dispatch, args)


def test_compiles_without_breaks_or_recompilations():
    def step(x, ids, scores, t):
        kept = ck.select_tokens(scores, grid_thw=[(t, 2, 3)], keep_ratio=0.5)
        result = ck.gather_tokens({"x": x, "ids": ids}, kept, layout="padded_left", pad_value={"ids": -100})
        return result["x"] * 2, result["ids"]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for t in (4, 6, 9, 11):
        n = 6 * t
        x = torch.randn(n, 5, requires_grad=True)
        args = (x, torch.arange(n), torch.randn(n), t)
        ours, ids = compiled(*args)
        wanted, wanted_ids = step(*args)
        assert torch.equal(ours, wanted)
        assert torch.equal(ids, wanted_ids)
        (grad,) = torch.autograd.grad(ours.square().sum(), x)
        assert torch.equal(grad, torch.autograd.grad(wanted.square().sum(), x)[0])
    assert counter.frame_count <= 2


def test_compiles_with_preallocated_results():
    def step(x, index, out):
        ck.gather_tokens(x, index, out=out)
        return out + 1

    torch._dynamo.reset()
    x, index, out = torch.randn(7, 3), torch.tensor([1, -1, 6]), torch.zeros(3, 3)
    result = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(x, index, out)
    assert torch.equal(out, ck.gather_tokens(x, index))
    assert torch.equal(result, out + 1)


def test_forward_mode_is_refused_and_not_dropped():
    index = torch.tensor([1, 0])
    with pytest.raises(RuntimeError, match="gather_tokens: it has no forward-mode derivative"):
        torch.func.jvp(lambda x: ck.gather_tokens(x, index), (torch.randn(3, 2),), (torch.randn(3, 2),))
