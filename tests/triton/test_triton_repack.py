"""Compaction of caches in Triton against the CPU engine: the same bits, elsewhere and in place."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.ops import repack as ops
from cacovid_kernels.triton import repack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ELSEWHERE, IN_HEADS, IN_FRONT = 0, 1, 2
B, H, N = 2, 3, 9
KEEP = {
    "one": torch.tensor([[[4]]]),
    "all": torch.arange(9).view(1, 1, 9),
    "some": torch.tensor([[[0, 3, 4, 8]]]),
    "per row": torch.tensor([[[0, 3, 8]], [[1, 2, -1]]]),
    "per head": torch.tensor([[[0, 1], [7, 8], [3, -1]]]),
    "per row and head": torch.stack([torch.randperm(9)[:5].sort().values for _ in range(6)]).view(2, 3, 5),
    "outside": torch.tensor([[[-5, 2, 9, 2**62]]]),
    "empty": torch.empty(1, 1, 0, dtype=torch.int64),
}
SIZED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(shape, dtype):
    size = torch.zeros((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)


def random_floats(shape, dtype):
    return (torch.randn(shape) * 3).to(dtype)


def bits(x):
    return x.view(SIZED[x.element_size()])


def memory_order(x, axes):
    """The same values, but the axes lie in memory in the order `axes`."""
    return x.permute(axes).contiguous().permute(sorted(range(x.dim()), key=lambda d: axes[d]))


def layouts(x):
    """The values of x in several memory layouts, with garbage between and around them."""
    yield x.clone()
    yield memory_order(x, (0, 2, 1, 3))  # [B, N, H, D]
    yield memory_order(x, (3, 0, 2, 1))  # no row is contiguous
    wide = random_bits([n + 2 for n in x.shape], x.dtype)
    yield wide[1:-1, 1:-1, 1:-1, 1:-1].copy_(x)
    yield random_bits([x.numel() + 1], x.dtype)[1:].view(x.shape).copy_(x)


def lists(count, kept, tokens):
    return torch.stack([torch.randperm(tokens)[:kept].sort().values for _ in range(count)])


def check(xs, *args):
    """Both backends give the same bits."""
    with ck.use_backend("cpu"):
        wanted = ops._repack_rows(xs, *args)
    found = ops._repack_rows(xs, *args)
    for x, y in zip(found, wanted, strict=True):
        assert x.is_contiguous()
        assert x.dtype == y.dtype
        assert torch.equal(bits(x), bits(y))


def check_in_place(xs, *args):
    """Both backends leave the same bits in the whole memory of every tensor."""
    with ck.use_backend("cpu"):
        copies = [x.untyped_storage().clone() for x in xs]
        others = [
            torch.empty(0, dtype=x.dtype).set_(copy, x.storage_offset(), x.shape, x.stride())
            for x, copy in zip(xs, copies, strict=True)
        ]
        ops._repack_rows_(others, *args)
    ops._repack_rows_(xs, *args)
    for x, copy in zip(xs, copies, strict=True):
        ours, theirs = (torch.empty(0, dtype=torch.uint8).set_(s) for s in (x.untyped_storage(), copy))
        assert torch.equal(ours, theirs)


@pytest.fixture
def launches(monkeypatch):
    """One entry per launch: how many programs it has."""
    found = []

    def counted(kernel, grid, *args, launch=repack.launch, **options):
        found.append(grid[0])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(repack, "launch", counted)
    return found


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype is torch.bool for x in args[1])
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal"), name
        assert not masks, name
        return func(*args, **(kwargs or {}))


def plain(xs):
    """Arguments behind the keep lists for tensors that share one and are not turned."""
    return [], [0] * len(xs), [], [], [False] * len(xs)


@pytest.mark.parametrize("number", range(len(DTYPES)), ids=lambda i: str(DTYPES[i]))
def test_rows_are_copied_bit_for_bit(number):
    torch.manual_seed(number)
    full = random_bits((B, H, N, (1, 2, 16, 33, 64, 100, 24)[number]), DTYPES[number])
    xs = [*layouts(full), full[:1].expand(B, H, N, -1).clone()]
    for name in [list(KEEP)[(number * 2 + i) % len(KEEP)] for i in range(2)]:  # all of them over the dtypes
        check(xs, [KEEP[name]], *plain(xs))


@pytest.mark.parametrize("columns", [1, 16, 33])
def test_in_place_gives_the_same_rows_and_touches_nothing_else(columns):
    torch.manual_seed(columns)
    full = random_bits((B, H, N, columns), torch.bfloat16)
    for name in ("all", "per row", "per row and head", "empty"):
        xs = list(layouts(full))[:: 1 if name == "per row and head" and columns == 16 else 3]
        check_in_place(xs, [KEEP[name]], *plain(xs), [IN_HEADS] * len(xs), columns != 33)
    for name in ("some", "per row and head"):
        xs = [full.clone()]
        check_in_place(xs, [KEEP[name]], *plain(xs), [IN_FRONT], False)


@pytest.mark.parametrize("placement", [IN_HEADS, IN_FRONT])
def test_no_row_is_overwritten_before_it_is_read(placement, monkeypatch):
    """Tiles of two rows: every program walks through many of them."""
    torch.manual_seed(placement)
    monkeypatch.setattr(repack, "VECTORS_IN_PLACE", 1)
    monkeypatch.setattr(repack, "ELEMENTS_TURNED", 2)
    monkeypatch.setattr(repack, "PROGRAMS", 1)
    columns, tokens = 256, 15
    for kept in (1, 8, 14, 15):
        keep = lists(2, kept, tokens).view(1, 2, kept)
        if kept == 14:
            keep[0, 0] = torch.arange(1, 15)  # no row stays where it is
            keep[0, 1, 9:] = -1
        xs = [random_bits((1, 2, tokens, columns), torch.float32)]
        check_in_place(xs, [keep], *plain(xs), [placement], True)
    xs, table = [random_floats((1, 2, tokens, 512), torch.bfloat16)], torch.randn(1, 2, 13, 256)
    keep = lists(2, 13, tokens).view(1, 2, 13)
    check_in_place(xs, [keep], [], [0], [table], [table.roll(1)], [True], [placement], True)
    if placement == IN_FRONT:
        for sizes in ((2, 15), (14, 1), (0, 9)):
            heads = [torch.randperm(tokens)[:n].sort().values for n in sizes]
            ragged = ck.RaggedKeep.from_lists([heads])
            xs = [random_bits((1, 2, tokens, columns), torch.float32)]
            check_in_place(xs, [ragged.indices], [ragged.cu_seqlens], [0], [], [], [False], [IN_FRONT], False)


def test_rows_of_several_tiles():
    torch.manual_seed(0)
    xs = [random_bits((1, 2, 300, 64), torch.bfloat16) for _ in range(3)] + [random_bits((1, 1, 20, 1100), torch.int16)]
    keep = [lists(2, 150, 300).view(1, 2, 150), torch.tensor([[[1, 2, 19]]])]
    check(xs, keep, [], [0, 0, 0, 1], [], [], [False] * 4)
    check_in_place(xs, keep, [], [0, 0, 0, 1], [], [], [False] * 4, [IN_HEADS, IN_HEADS, IN_FRONT, IN_FRONT], False)


def test_layers_of_several_shapes_and_lists():
    torch.manual_seed(0)
    keys = [random_bits((1, 2, 20 + 10 * (i % 2), 64), torch.bfloat16) for i in range(5)]
    values = [random_bits((1, 2, 20 + 10 * (i % 2), 48), torch.int32) for i in range(5)]
    keep = [lists(2, 7 + i // 3, 20).view(1, 2, -1) for i in range(5)]
    args = keep, [], [*range(5)] * 2, [], [], [False] * 10
    check(keys + values, *args)
    check_in_place(keys + values, *args, [IN_HEADS, IN_FRONT] * 5, False)
    many = [random_bits((1, 1, 6, 4), torch.int16) for _ in range(11)]  # more than pointers are chosen from at a time
    check(many, [torch.tensor([[[1, 5]]])], *plain(many))
    own = random_bits((1, 1, 20, 8), torch.int8), random_bits((1, 1, 20, 8), torch.int8)
    check([*own, *own], [torch.tensor([[[1, 4]]]), torch.tensor([[[0, 19]]])], [], [0, 1, 1, 0], [], [], [False] * 4)


def test_ragged_heads():
    torch.manual_seed(0)
    full = random_bits((B, H, N, 16), torch.bfloat16)
    for sizes in ([3, 0, 9, 1, 0, 4], [0, 0, 0, 0, 0, 2]):
        heads = [torch.randperm(N)[:n].sort().values for n in sizes]
        keep = ck.RaggedKeep.from_lists([heads[:H], heads[H:]])
        xs = list(layouts(full))
        args = [keep.indices], [keep.cu_seqlens], [0] * len(xs), [], [], [False] * len(xs)
        check(xs, *args)
    wild = torch.tensor([-1, 9, 2**62, 3, -(2**63), 8])
    check(xs[:1], [wild], [torch.tensor([0, 1, 1, 3, 5, 6, 6], dtype=torch.int32)], [0], [], [], [False])


def test_bounds_that_lie_read_nothing_outside():
    """On a GPU nobody checks cu_seqlens: whatever they hold, the guard sees no stray access."""
    x, index = random_bits((2, 2, 5, 4), torch.int16), torch.arange(8) % 6
    for bounds in ([0, 3, -7, 100, 8], [5, 5, 5, 5, 5], [-(2**31), 2**31 - 1, 0, -1, 3]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        repack.repack_rows([x], [index], [cu_seqlens], [0], [], [], [False])
        repack.repack_rows_([x], [index], [cu_seqlens], [0], [], [], [False], [IN_FRONT], False)
    unsorted = torch.tensor([[[4, 4, 0, -3, 5]]])
    repack.repack_rows_([x], [unsorted], *plain([x]), [IN_HEADS], False)
    with pytest.raises(ValueError, match="at most N rows"):
        repack.repack_rows_([x], [torch.arange(21)], [cu_seqlens], [0], [], [], [False], [IN_FRONT], False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_are_turned_with_the_bits_of_the_engine(dtype):
    torch.manual_seed(0)
    for columns, half, shape in ((37, 15, (1, 1)), (64, 16, (1, 2))):
        keys, values = random_floats((1, 2, N, columns), dtype), random_floats((1, 2, N, columns), dtype)
        keep = lists(2, 5, N).view(1, 2, 5)
        keep[0, 1, 3:] = torch.tensor([-1, 2**40])
        cos, sin = torch.randn(2, *shape, 5, half)
        xs = [values, keys, memory_order(keys, (3, 0, 2, 1)), values.clone()]
        args = [keep], [], [0] * 4, [cos], [sin], [False, True, True, False]
        check(xs, *args)
        keep[0, 1, 4] = -1
        check_in_place(xs, *args, [IN_HEADS] * 4, True)
    ragged = ck.RaggedKeep.from_lists([[torch.tensor([0, 1, 4, 7, 8])], [torch.tensor([3])]])
    cos, sin = torch.randn(2, 6, 8)
    keys = random_floats((2, 1, N, 24), dtype)
    args = [ragged.indices], [ragged.cu_seqlens], [0, 0], [cos], [sin], [True, False]
    check([memory_order(keys, (0, 2, 1, 3)), keys], *args)
    check_in_place([keys, keys.clone()], *args, [IN_FRONT] * 2, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_turned_keys_round_to_nearest_even(dtype):
    # Every 13th value of 16 bits, among them subnormals, infinities and NaN, times 1 +- a bit, and added to a tie.
    values = torch.arange(0, 65536, 13, dtype=torch.int32)[:4992].to(torch.int16).view(1, 1, 39, 128).view(dtype)
    values[..., 64:] = values[..., :64].flip(-1)
    keep, ones = torch.arange(39).view(1, 1, 39), torch.ones(1, 1, 39, 64)
    for cos, sin in ((ones, ones), (ones * (1 + 2.0**-8), ones * -(2.0**-9)), (ones * -0.0, ones * 0.0)):
        check([values], [keep], [], [0], [cos], [sin], [True])


def test_keys_and_values_move_together(launches):
    """The public op: one launch for all layers, whether keys are turned or not."""
    torch.manual_seed(0)
    cache = [[torch.randn(1, 2, 24, 16).bfloat16() for _ in range(3)] for _ in range(2)]
    kept = ck.select_tokens(torch.randn(24), grid_thw=[(2, 3, 4)], keep_ratio=0.3)
    rope = ck.Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16))
    for options in ({}, {"rope": rope}, {"inplace": True, "rope": rope, "release": True}):
        with ck.use_backend("cpu"):
            wanted = ck.repack_kv([[x.clone() for x in xs] for xs in cache], kept, **options)
        found = ck.repack_kv([[x.clone() for x in xs] for xs in cache], kept, **options)
        for x, y in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
            assert torch.equal(bits(x), bits(y))
    assert len(launches) == 3


def test_launches_and_no_host_reads(launches, monkeypatch):
    keys, values = [torch.randn(1, 2, 12, 8) for _ in range(6)], [torch.randn(1, 2, 12, 4) for _ in range(6)]
    keep, tables = lists(2, 4, 12).view(1, 2, 4), torch.randn(1, 2, 4, 4)
    turned = [True] * 3 + [False] * 3
    bounds = (torch.arange(3) * 4).int()
    with NoHostReads():
        repack.repack_rows(keys, [keep], *plain(keys))
        repack.repack_rows(keys, [keep], [], [0] * 6, [tables], [tables], turned)
        repack.repack_rows(keys, [keep.view(-1)], [bounds], [0] * 6, [], [], [False] * 6)
        repack.repack_rows_(keys, [keep] * 6, [], [*range(6)], [], [], [False] * 6, [IN_HEADS] * 6, True)
        assert len(launches) == 4
        repack.repack_rows(keys + values, [keep], *plain(keys + values))  # a launch per shape
        assert len(launches) == 6
        monkeypatch.setattr(repack, "POINTERS", 10)
        repack.repack_rows(keys, [keep] * 6, [], [*range(6)], [], [], [False] * 6)  # three pointers per tensor
        assert len(launches) == 8


def test_offsets_beyond_32_bits():
    """Heads 2^30 elements apart: only the pages of their rows are ever touched."""
    for dtype, columns in ((torch.int8, 3), (torch.int16, 8)):
        x = torch.empty_strided((2, 2, 5, columns), (2**31 + 8, 2**30 + (columns == 3), 16, 1), dtype=dtype)
        x.copy_(torch.arange(20 * columns).view(2, 2, 5, columns))
        keep = torch.tensor([[[0, 2, 4]]])
        check([x], [keep], *plain([x]))
        with ck.use_backend("cpu"):
            (wanted,) = ops._repack_rows([x], [keep], *plain([x]))
        ops._repack_rows_([x], [keep], *plain([x]), [IN_HEADS], True)
        assert torch.equal(x[:, :, :3], wanted)
        assert not x[:, :, 3:].any()
