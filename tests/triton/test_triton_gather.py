"""Gather and its adjoint in Triton against the CPU engine: the same bits for every dtype, stride and index."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.ops import gather as ops
from cacovid_kernels.triton import gather, scatter

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((20,), 0), ((20, 9), 0), ((3, 20), 1), ((20, 64), 0), ((2, 20, 33), 1), ((3, 2, 20, 4), 2), ((20, 2, 3), 0),
    ((20, 8), 0),
]  # fmt: skip
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
SIZED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(shape, dtype):
    """A tensor of random bytes, so that NaN payloads and -0 are among the values."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.zeros((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)


def layouts(x):
    """The values of x in several memory layouts, with garbage between and around them."""
    yield x
    order = torch.randperm(x.dim())
    yield x.permute(*order).contiguous().permute(*order.argsort())
    wide = random_bits([2 * n + 3 for n in x.shape], x.dtype)
    yield wide[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)].copy_(x)
    yield random_bits([x.numel() + 1], x.dtype)[1:].view(x.shape).copy_(x)


def same(a, b):
    integer = SIZED[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def check(op, *args):
    """Both backends give the same bits; returns them."""
    with ck.use_backend("cpu"):
        wanted = op(*args)
    found = op(*args)
    assert all(x.is_contiguous() and same(x, y) for x, y in zip(found, wanted, strict=True))
    return found


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    for module in (gather, scatter):

        def counted(kernel, *args, launch=module.launch, **options):
            names.append(kernel.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype is torch.bool for x in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        assert not masks, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", range(len(DTYPES)), ids=lambda i: str(DTYPES[i]))
def test_rows_are_copied_bit_for_bit(number):
    torch.manual_seed(number)
    tensors = [(x, dim) for shape, dim in SHAPES for x in layouts(random_bits(shape, DTYPES[number]))]
    for name in [list(INDICES)[(number * 2 + i) % len(INDICES)] for i in range(2)]:  # all of them over the dtypes
        check(ops._gather_rows, [x for x, _ in tensors], INDICES[name], [dim for _, dim in tensors])


def test_many_axes_broadcast_and_empty_tensors():
    torch.manual_seed(0)
    index = INDICES["padding"]
    five = random_bits((4, 3, 4, 20, 6, 2), torch.int16)[::2, :, ::2, :, ::2]  # four axes that do not merge
    eight = random_bits((2, 1, 2, 2, 20, 2, 1, 3), torch.uint16)[:, :, :, :, :, ::2]
    row = torch.arange(20.0)
    # The first and the third axis would merge, but not in the result.
    around = random_bits((20, 3, 4, 6), torch.int16)[..., ::2].transpose(0, 1)
    narrow = random_bits((20, 17), torch.bfloat16)[:, :16]  # rows of whole vectors, but not at their multiples
    xs = [five, five.to(torch.float8_e4m3fn), eight, row.expand(4, 20), row[:, None].expand(20, 70), around, narrow]
    check(ops._gather_rows, xs, index, [3, 3, 4, 1, 0, 1, 0])
    empty = [((0, 5), 0), ((4, 0), 0), ((0, 4, 5), 1), ((4, 5, 0), 1), ((3, 0), 1)]
    found = check(ops._gather_rows, [torch.ones(s) for s, _ in empty], torch.tensor([0, -1, 3]), [d for _, d in empty])
    assert not any(x.any() for x in found)


def test_rows_of_several_tiles():
    torch.manual_seed(0)
    wide, long = random_bits((6, 1300), torch.bfloat16), random_bits((2, 2500), torch.int16)
    for count in (5, 40):  # beyond 6 tokens all rows come before the next columns
        check(
            ops._gather_rows,
            [wide, wide.clone()[:, 1:], wide[:, :9].clone().t()],
            torch.randint(-1, 7, (count,)),
            [0, 0, 1],
        )
    check(ops._gather_rows, [long, long.t().contiguous()], torch.randint(-1, 2501, (1500,)), [1, 0])
    check(ops._gather_rows, [random_bits((700, 64), torch.bfloat16)], torch.randint(-1, 701, (300,)), [0])


def test_prompts_and_combinations(launches):
    torch.manual_seed(0)
    n = 60
    prompt = {
        "embeds": torch.randn(n, 40).bfloat16(),
        "position_ids": torch.arange(3 * n).view(3, 1, n),
        "mask": torch.ones(n, dtype=torch.bool),
        "labels": torch.arange(n),
    }
    index = torch.stack([torch.randperm(n)[:7].sort().values for _ in range(5)])
    found = ck.gather_tokens(prompt, index)
    assert launches == ["gather_kernel"]
    for name, x in prompt.items():
        wanted = x[:, :, index] if name == "position_ids" else x[index]
        assert same(found[name], wanted)
    kept = ck.select_tokens(torch.randn(n), grid_thw=[(2, 3, 4), (4, 3, 3)], num_tokens=[5, 8])
    with ck.use_backend("cpu"):
        wanted = ck.gather_tokens(prompt, kept, layout="padded_left", pad_value={"labels": -100})
    found = ck.gather_tokens(prompt, kept, layout="padded_left", pad_value={"labels": -100})
    assert all(same(found[name], wanted[name]) for name in prompt)


def test_launches_and_no_host_reads(launches):
    xs, index = [torch.randn(9, 3) for _ in range(9)], torch.randint(-1, 10, (9,))
    with NoHostReads():
        gather.gather_rows(xs[:8], index, [0] * 8)
        assert launches == ["gather_kernel"]
        gather.gather_rows(xs, index.int()[None, ::2], [0] * 9)
        gather.gather_rows_out(xs[:2], index, [0] * 2, [torch.zeros(9, 3), torch.zeros(3, 9).t()])
        assert launches == ["gather_kernel"] * 4
        scatter.scatter_rows(xs, index, [11] * 9, [0] * 9)
        assert launches == ["gather_kernel"] * 4 + ["scatter_kernel"] * 2
        gather.gather_rows([torch.zeros(4, 0)], index, [0])
    assert len(launches) == 6


def test_preallocated_results():
    torch.manual_seed(0)
    x, ids, index = torch.randn(30, 6), torch.arange(30), torch.tensor([4, -1, 29, 30, 4])
    frame = torch.full((5, 16), -1.0)
    outs = [frame[:, 5:11], torch.full((6,), -1)[1:], torch.full((6, 5), -1.0).t()]
    ck.gather_tokens([x, ids, x], index, out=outs)
    (wide, flat) = check(ops._gather_rows, [x, ids], index, [0, 0])
    assert same(outs[0].contiguous(), wide)
    assert same(outs[2].contiguous(), wide)
    assert same(outs[1], flat)
    assert (frame[:, :5] == -1).all()
    assert (frame[:, 11:] == -1).all()


def test_offsets_beyond_32_bits():
    """Rows 2^30 elements apart: only the pages of these rows are ever touched."""
    for dtype, columns in ((torch.int8, 3), (torch.int16, 8)):
        step = 2**30 + (columns == 3)
        x = torch.empty_strided((4, columns), (step, 1), dtype=dtype)
        x.copy_(torch.arange(4 * columns).view(4, columns))
        found = check(ops._gather_rows, [x], torch.tensor([3, 0, 2, 4]), [0])
        assert torch.equal(found[0][2], x[2])
    outer = torch.empty_strided((4, 2, 3), (2**30 + 1, 3, 1), dtype=torch.int8)
    check(ops._gather_rows, [outer.copy_(torch.arange(24).view(4, 2, 3))], torch.tensor([1, -1]), [1])


# ---- the adjoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_have_the_bits_of_the_engine(dtype):
    torch.manual_seed(0)
    index = torch.randint(-1, 40, (6, 10), dtype=torch.int32)
    shapes = [((6, 10, 70), 0, 37), ((3, 6, 10), 1, 45), ((6, 10, 16), 0, 40), ((2, 6, 10, 600), 1, 38)]
    grads = [(torch.randn(shape) * 100).to(dtype) for shape, _, _ in shapes]
    grads[2] = torch.randn(16, 6, 10).to(dtype).permute(1, 2, 0)
    args = index, [size for _, _, size in shapes], [dim for _, dim, _ in shapes]
    found = check(ops._scatter_rows, grads, *args)
    assert not found[1][:, 40:].any()
    for name in ("empty", "scalar", "outside"):
        flat = INDICES[name]
        check(ops._scatter_rows, [torch.randn(*flat.shape, 5).to(dtype)], flat, [20], [0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_follow_the_stated_order(dtype):
    # In ascending position the 1 is lost in float32: 1e8 + 1 - 1e8 = 0; with 1e8 - 1e8 first it is not.
    big = 2.0**60 if dtype is torch.float64 else 2.0**14 if dtype is torch.float16 else 1e8
    one = 2.0**-12 if dtype is torch.float16 else 1.0
    grads = torch.tensor([[big], [one], [-big], [one]], dtype=dtype)
    sums = ops._scatter_rows([grads], torch.tensor([2, 2, 2, 0]), [4], [0])[0]
    assert sums.flatten().tolist() == [one, 0.0, 0.0, 0.0]
    # 256 + 1 + 1 is lost in bfloat16 and 2048 + 1 + 1 in float16: sums must be wider than the storage.
    base = {torch.bfloat16: 256.0, torch.float16: 2048.0}.get(dtype, 1.0)
    sums = ops._scatter_rows([torch.tensor([base, 1.0, 1.0], dtype=dtype)], torch.tensor([1, 1, 1]), [3], [0])[0]
    assert sums.tolist() == [0.0, base + 2, 0.0]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_round_to_nearest_even(dtype):
    # Sums of two cover ties, subnormals, the overflow to infinity, infinities and NaN of either sign.
    halves = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    tiny = torch.full_like(halves, torch.finfo(dtype).smallest_normal / 64)
    for other in (halves.flip(0), tiny, halves.roll(1)):
        check(ops._scatter_rows, [torch.stack([halves, other])], torch.tensor([0, 0]), [1], [0])


def test_gradients():
    index = torch.tensor([[4, -1, 4], [0, 5, 1]])
    a = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def call(a, b):
        found = ck.gather_tokens([a, b, torch.arange(5)], index, dim=[0, 1, 0])
        return found[0], found[1]

    assert torch.autograd.gradcheck(call, (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (a, b), fast_mode=True)


def test_gradients_have_the_bits_of_the_engine():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 24).bfloat16(), torch.randn(4, 10, 24)
    index = torch.randint(-1, 50, (4, 10))

    def gradient():
        leaf = x.clone().requires_grad_()
        ((ck.gather_tokens(leaf, index).float() * weight).sum() / math.pi).backward()
        return [leaf.grad]

    check(gradient)
