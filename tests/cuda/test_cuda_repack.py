"""Compaction of caches in CUDA against the CPU engine: the same bits, elsewhere and in place."""

from __future__ import annotations

from random import Random

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels.ops import repack as ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ELSEWHERE, IN_HEADS, IN_FRONT = 0, 1, 2
SIZED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(shape, dtype):
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).squeeze(-1)


def random_floats(shape, dtype):
    return (torch.randn(shape) * 3).to(dtype)


def memory_order(x, axes):
    """The same values, but the axes lie in memory in the order `axes`."""
    back = sorted(range(x.dim()), key=lambda d: axes[d])
    return x.permute(axes).clone(memory_format=torch.contiguous_format).permute(back)


def layouts(x):
    """The values of x in several memory layouts, with garbage between and around them."""
    yield x.clone()
    yield memory_order(x, (0, 2, 1, 3))  # [B, N, H, D]
    yield memory_order(x, (3, 0, 2, 1))  # no row is contiguous
    wide = random_bits([n + 2 for n in x.shape], x.dtype)
    yield wide[1:-1, 1:-1, 1:-1, 1:-1].copy_(x)
    yield random_bits([x.numel() + 1], x.dtype)[1:].view(x.shape).copy_(x)


def lists(b, h, kept, tokens):
    rows = [torch.randperm(tokens)[:kept].sort().values for _ in range(b * h)]
    return torch.stack(rows).view(b, h, kept)


def same_memory(a, b, dtype):
    """Equal bits; of floats any NaN for another."""
    same = a.view(SIZED[dtype.itemsize]) == b.view(SIZED[dtype.itemsize])
    if dtype in FLOATS:
        same |= a.view(dtype).isnan() & b.view(dtype).isnan()
    return bool(same.all())


def check(xs, *args):
    with ck.use_backend("cpu"):
        wanted = ops._repack_rows(xs, *args)
    found = ops._repack_rows(xs, *args)
    for x, y in zip(found, wanted, strict=True):
        assert x.is_contiguous()
        assert x.dtype == y.dtype
        assert same_memory(x, y, x.dtype)


def whole_memory(x):
    storage = x.untyped_storage()
    rounded = storage.nbytes() // x.element_size()
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, (rounded,))


def check_in_place(xs, *args):
    """The same bits in the whole memory of every tensor."""
    others = []
    for x in xs:
        copy = x.untyped_storage().clone()
        others.append(torch.empty(0, dtype=x.dtype).set_(copy, x.storage_offset(), x.shape, x.stride()))
    with ck.use_backend("cpu"):
        ops._repack_rows_(others, *args)
    ops._repack_rows_(xs, *args)
    for x, y in zip(xs, others, strict=True):
        assert same_memory(whole_memory(x), whole_memory(y), x.dtype)


def plain(xs):
    """Arguments behind the keep lists for tensors that share one and are not turned."""
    return [], [0] * len(xs), [], [], [False] * len(xs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 3, 16, 33, 64, 100, 600])
def test_rows_of_every_width(dtype, columns):
    torch.manual_seed(columns)
    full = random_bits((2, 3, 9, columns), dtype)
    for keep in (lists(1, 1, 4, 9), lists(2, 1, 9, 9), lists(1, 3, 1, 9), lists(2, 3, 5, 9)):
        xs = [*layouts(full), full[:1].expand(2, 3, 9, columns)]
        check(xs, [keep], *plain(xs))
    xs = list(layouts(full))
    check_in_place(xs, [lists(2, 3, 5, 9)], *plain(xs), [IN_HEADS] * len(xs), columns % 2 == 0)
    check_in_place([full], [lists(2, 3, 5, 9)], *plain([full]), [IN_FRONT], True)


@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
def test_alignment_decides_the_width(start):
    storage = torch.randint(0, 256, (2 * 20 * 64 + 16,), dtype=torch.uint8)
    x = storage[start : start + 2 * 20 * 64].view(1, 2, 20, 64)
    check([x], [lists(1, 1, 7, 20)], *plain([x]))
    check_in_place([x], [lists(1, 2, 13, 20)], *plain([x]), [IN_HEADS], True)


def test_positions_out_of_range_give_zeros():
    keep = torch.tensor([[[-5, 2, 9, 2**62, -(2**63), 8, 2**32 + 1]]])
    xs = list(layouts(random_bits((2, 3, 9, 24), torch.bfloat16)))
    check(xs, [keep], *plain(xs))
    padded = torch.tensor([[[2, 5, -1, 2**40]]])
    check_in_place(xs, [padded], *plain(xs), [IN_HEADS] * len(xs), False)


@pytest.mark.parametrize("placement", [IN_HEADS, IN_FRONT])
def test_no_row_is_overwritten_before_it_is_read(placement):
    """Walks of many steps, and of rows that the fewest steps move at once."""
    torch.manual_seed(placement)
    for tokens, kept, columns in ((900, 895, 8), (300, 30, 64), (700, 699, 128), (70, 69, 520)):
        keep = lists(1, 2, kept, tokens)
        keep[0, 0] = torch.arange(tokens - kept, tokens)  # every row moves by as little as rows can
        xs = [random_bits((1, 2, tokens, columns), torch.bfloat16)]
        check_in_place(xs, [keep], *plain(xs), [placement], True)
    tokens, kept = 200, 190
    table = torch.randn(1, 2, kept, 64)
    xs = [random_floats((1, 2, tokens, 140), torch.bfloat16) for _ in range(2)]
    args = [lists(1, 2, kept, tokens)], [], [0, 0], [table], [table.roll(1)], [True, False]
    check_in_place(xs, *args, [placement] * 2, True)


def test_layers_of_several_shapes_and_lists():
    torch.manual_seed(0)
    keys = [random_bits((1, 2, 20 + 10 * (i % 2), 64), torch.bfloat16) for i in range(5)]
    values = [random_bits((1, 2, 20 + 10 * (i % 2), 48), torch.int32) for i in range(5)]
    keep = [lists(1, 2, 7 + i // 3, 20) for i in range(5)]
    args = keep, [], [*range(5)] * 2, [], [], [False] * 10
    check(keys + values, *args)
    check_in_place(keys + values, *args, [IN_HEADS, IN_FRONT] * 5, False)


@pytest.mark.parametrize("own_lists", [False, True])
def test_more_tensors_than_one_launch_takes(own_lists):
    torch.manual_seed(0)
    xs = [random_floats((1, 1, 6, 8 + 8 * (i % 2)), torch.float32) for i in range(300)]
    count = 150 if own_lists else 1
    keep = [lists(1, 1, 3, 6) for _ in range(count)]
    cos, sin = [torch.randn(1, 1, 3, 4) for _ in range(count)], [torch.randn(1, 1, 3, 4) for _ in range(count)]
    args = keep, [], [i % count for i in range(300)], cos, sin, [i < 150 for i in range(300)]
    check(xs, *args)
    check_in_place(xs, *args, [(IN_HEADS, IN_FRONT)[i % 3 == 0] for i in range(300)], True)


def test_ragged_heads():
    torch.manual_seed(0)
    full = random_bits((2, 3, 9, 16), torch.bfloat16)
    for sizes in ([3, 0, 9, 1, 0, 4], [0, 0, 0, 0, 0, 2], [1, 0, 0, 0, 0, 0]):
        heads = [torch.randperm(9)[:n].sort().values for n in sizes]
        keep = ck.RaggedKeep.from_lists([heads[:3], heads[3:]])
        xs = list(layouts(full))
        check(xs, [keep.indices], [keep.cu_seqlens], [0] * len(xs), [], [], [False] * len(xs))
        check_in_place([full.clone()], [keep.indices], [keep.cu_seqlens], [0], [], [], [False], [IN_FRONT], False)
    cos, sin = torch.randn(2, 1, 6)
    keys = random_floats((2, 3, 9, 16), torch.float16)
    args = [keep.indices], [keep.cu_seqlens], [0, 0], [cos], [sin], [True, False]
    check([keys, keys.clone()], *args)
    check_in_place([keys, keys.clone()], *args, [IN_FRONT] * 2, False)


def test_bounds_that_lie_touch_nothing_else():
    """On a GPU nobody reads cu_seqlens before the kernels do."""
    index = torch.arange(8) % 6
    for bounds in ([0, 3, -7, 100, 8], [5, 5, 5, 5, 5], [-(2**31), 2**31 - 1, 0, -1, 3], [8, 8, 0, 0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        memory = torch.full((3, 2, 2, 5, 4), 7, dtype=torch.int16)
        ops._repack_rows([memory[1]], [index], [cu_seqlens], [0], [], [], [False])
        ops._repack_rows_([memory[1]], [index], [cu_seqlens], [0], [], [], [False], [IN_FRONT], False)
        assert (memory[::2] == 7).all()
    with pytest.raises(ValueError, match="at most N rows"):
        ops._repack_rows_([memory[1]], [torch.arange(21)], [cu_seqlens], [0], [], [], [False], [IN_FRONT], False)


def test_lists_that_do_not_ascend_stay_inside_the_tensor():
    rng = Random(0)
    for _ in range(30):
        memory = torch.full((3, 2, 3, 9, 24), 7, dtype=torch.int16)
        keep = torch.tensor([rng.choice([0, 3, 8, 9, -1, 2**33, -(2**60)]) for _ in range(12)]).view(2, 3, 2)
        ops._repack_rows_([memory[1]], [keep], [], [0], [], [], [False], [rng.choice([IN_HEADS, IN_FRONT])], True)
        assert (memory[::2] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_are_turned_with_the_bits_of_the_engine(dtype):
    torch.manual_seed(0)
    for columns, half, shape in (
        (37, 15, (1, 1)),
        (64, 16, (1, 2)),
        (128, 64, (1, 2)),
        (24, 8, (1, 1)),
        (9, 0, (1, 1)),
    ):
        keys, values = random_floats((1, 2, 9, columns), dtype), random_floats((1, 2, 9, columns), dtype)
        keep = lists(1, 2, 5, 9)
        keep[0, 1, 3:] = torch.tensor([-1, 2**40])
        cos, sin = torch.randn(2, *shape, 5, half)
        unaligned = torch.empty(cos.numel() + 1)[1:].view(cos.shape).copy_(cos)
        for cosine in (cos, unaligned):
            xs = [values, keys, memory_order(keys, (3, 0, 2, 1)), values.clone(), memory_order(keys, (0, 2, 1, 3))]
            args = [keep], [], [0] * 5, [cosine], [sin], [False, True, True, False, True]
            check(xs, *args)
            check_in_place([x.clone() for x in xs], *args, [IN_HEADS] * 5, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_turned_keys_round_to_nearest_even(dtype):
    """Every value of 16 bits, among them subnormals, infinities and NaN, times 1 +- a bit, and added to a tie."""
    values = torch.arange(0, 65536, dtype=torch.int32).to(torch.int16).view(1, 1, 512, 128).view(dtype)
    cos = torch.full((1, 1, 512, 64), 1.00390625)
    cos[:, :, 1::2] = 1 - 2**-9
    sin = torch.full((1, 1, 512, 64), 2.0**-9)
    sin[:, :, ::3] = 0
    check([values], [torch.arange(512).view(1, 1, 512)], [], [0], [cos], [sin], [True])


def test_empty_results():
    empty = torch.empty(1, 1, 0, dtype=torch.int64)
    x = torch.randn(2, 3, 5, 4)
    check([x, x[..., :0], x[:0]], [empty, lists(1, 1, 2, 5)], [], [0, 1, 1], [], [], [False] * 3)
    check_in_place([x.clone()], [empty], *plain([x]), [IN_HEADS], True)
    for none in (x[:0], x[:, :0]):
        check_in_place([none.clone()], [lists(1, 1, 2, 5)], *plain([none]), [IN_HEADS], True)
    check([x[:, :, :0]], [torch.tensor([[[0, 3]]])], *plain([x]))


def test_ten_thousand_moves_in_place():
    """Small random heads: every list of ascending positions is likely to occur."""
    rng = Random(0)
    torch.manual_seed(0)
    for case in range(100):
        b, h, tokens, columns = 10, 10, rng.randint(1, 12), rng.choice([1, 3, 8, 16])
        kept = rng.randint(1, tokens)
        order = torch.rand(b, h, tokens).argsort(-1)[..., :kept].sort(-1).values
        x = random_bits((b, h, tokens, columns), (torch.bfloat16, torch.float32)[case % 2])
        check_in_place([x], [order], *plain([x]), [(IN_HEADS, IN_FRONT)[case % 2]], case % 3 == 0)
