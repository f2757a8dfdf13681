"""Compaction of paged caches in Triton against the CPU engine: the same bits in all memory, the same tables."""

from __future__ import annotations

from random import Random

import pytest
import torch
from paged_cases import Call, assert_same, random_call
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.ops import paged as ops
from cacovid_kernels.triton import paged

INV_FREQ = 10000.0 ** (-torch.arange(0, 8, 2) / 8)


def check(call):
    """Both backends leave the same bits and return the same tables."""
    wanted = call.copy()
    with ck.use_backend("cpu"):
        expected = ops._repack_pages(*wanted.args())
    assert_same(call, ops._repack_pages(*call.args()), wanted, expected)


def pages_of(count, shape, dtype=torch.float32):
    return [(torch.randn(shape) * 3).to(dtype) for _ in range(count)]


def call_of(xs, table, lens, keep, angles=(), turned=0, where=None):
    """A call whose tensors share a list, the first `turned` of them turned by the angles."""
    cos, sin = ([angles.cos()], [angles.sin()]) if turned else ([], [])
    rotated = [i < turned for i in range(len(xs))]
    tables = [None if x is None else x.int().contiguous() for x in (table, where)]
    return Call(xs, xs, tables[0], torch.tensor(lens).int(), [keep], [0] * len(xs), cos, sin, rotated, tables[1])


def ascending(n, kept, *lead):
    rows = [torch.randperm(n)[:kept].sort().values for _ in range(torch.Size(lead).numel())]
    return torch.stack(rows).view(*lead, kept)


@pytest.fixture
def launches(monkeypatch):
    """One entry per launch: how many programs it has."""
    found = []

    def counted(kernel, grid, *args, launch=paged.launch, **options):
        found.append(grid[0])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(paged, "launch", counted)
    return found


class NoHostReads(TorchDispatchMode):
    """Fails where values would have to come to the host, or a tensor from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "index", "index_put_"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("in_place", [True, False])
def test_random_calls(part, in_place):
    for seed in range(7 * part, 7 * part + 7):
        check(random_call(Random(f"{seed} {in_place}"), seed % 3 == 0, in_place, most=3))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_odd_floats_are_turned_with_the_bits_of_the_engine():
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(0, 65536, 13, dtype=torch.int32)[:4992].to(torch.int16).view(13, 3, 1, 128).view(dtype)
        table, keep, angles = torch.randperm(13)[None], ascending(39, 30, 1, 1), torch.randn(1, 1, 30, 64)
        check(call_of([values.clone()], table, [39], keep, angles, 1))


@pytest.mark.parametrize("turned", [0, 2])
@pytest.mark.parametrize("in_place", [True, False])
def test_rows_of_several_tiles(turned, in_place):
    """More rows than a program moves at a time, most of them close to where they were."""
    table = torch.randperm(40)
    where = None if in_place else table[24:].view(2, 8).int()
    xs = pages_of(3, (40, 16, 2, 64), torch.bfloat16)
    keep = ascending(180, 120, 2, 2)
    keep[0, :, 100:] = -1
    check(call_of(xs, table[:24].view(2, 12), [180, 190], keep, torch.randn(2, 1, 120, 32), turned, where))
    xs = pages_of(2, (40, 16, 2, 64))
    check(
        call_of(xs, table[:24].view(2, 12), [180, 190], ascending(180, 128, 1, 1), torch.zeros(1, 1, 128, 32), turned)
    )


@pytest.mark.parametrize("turned", [0, 5])
def test_a_list_per_layer(turned):
    xs, table = pages_of(10, (6, 4, 2, 8)), torch.randperm(6).view(2, 3)
    call = call_of(xs, table, [12, 10], ascending(10, 5, 1, 1))
    call.keep, call.keep_of = [ascending(10, 5, 1, 2) for _ in range(5)], [*range(5)] * 2
    if turned:
        angles = [torch.randn(1, 1, 5, 4) for _ in range(5)]
        call.cos, call.sin = [x.cos() for x in angles], [x.sin() for x in angles]
        call.rotated = [i < turned for i in range(10)]
    check(call)


def test_long_tables():
    """More blocks and rows than a program counts at a time."""
    table = torch.randperm(6000).view(2, 3000)
    xs = [torch.randint(0, 256, (6000, 1, 1, 4), dtype=torch.uint8)]
    keep = ascending(1400, 1100, 1, 1)
    check(call_of([xs[0].clone()], table[:, :1500], [1400, 1500], keep))
    keep = torch.cat([keep[..., :1030], torch.full((1, 1, 200), -1)], -1)
    check(call_of(xs, table[:, :1400], [1400, 1399], keep, where=table[:, 1500:2730]))


def test_shared_prefixes_are_read_only():
    """The guard sees every store: none of them goes to a block that another sequence reads."""
    table, keep = torch.tensor([[5, 0, 9], [5, 2, 1]]), torch.tensor([[[0, 1, 2, 3, 5, 9]], [[0, 1, 2, 3, 6, -1]]])
    for turned in (0, 2):
        xs = pages_of(4, (10, 4, 2, 8))
        xs[0][5, 1] = float("inf")
        before = [x.clone() for x in xs]
        angles = (torch.arange(6) - keep.clamp(min=0))[..., None] * INV_FREQ
        check(call_of(xs, table, [11, 7], keep, angles, turned))
        assert all(torch.equal(x[5], y[5]) for x, y in zip(xs, before, strict=True))


def test_tables_that_lie_touch_nothing_outside():
    """On a GPU nobody checks tables or positions: whatever they hold, no access leaves the cache."""
    rng = Random(0)
    for in_place in (True, False, False):
        call = random_call(rng, True, in_place)
        blocks, size = call.pages[0].shape[:2]
        call.seq_lens.fill_(2**31 - 1)
        for keep in call.keep:
            keep.random_(-2, call.block_table.shape[1] * size + 2)
        call.block_table.view(-1)[::2] = torch.tensor([-(2**31), 2**31 - 1, blocks]).repeat(9)[
            : len(call.block_table.view(-1)[::2])
        ]
        if in_place:  # a race for a block listed twice is one that callers are told of
            ops._repack_pages(*call.args())
        else:
            check(call)


@pytest.mark.parametrize("in_place", [True, False])
def test_blocks_that_do_not_exist(in_place):
    xs, keep = pages_of(2, (12, 4, 2, 8)), torch.arange(12).view(1, 1, 12)
    table = torch.tensor([[5, 12, 2], [-1, 1, 2**31 - 1], [8, 9, 10]])
    where = None if in_place else torch.tensor([[0, 3, 4], [6, 12, 7], [-(2**31), 2**31 - 1, -1]])
    check(call_of(xs, table, [12, 12, 11], keep, torch.randn(1, 1, 12, 4), 1, where))


def test_half_a_turn_is_a_turn():
    """Where the sine is 0 the cosine says whether a row stays as it is."""
    xs, keep = pages_of(1, (3, 4, 2, 8)), torch.tensor([[[0, 1, 2, 5, 9]]])
    call = call_of(xs, torch.tensor([[2, 0, 1]]), [12], keep, torch.zeros(1, 1, 5, 4), 1)
    call.cos[0][:, :, 1, 2] = -1
    check(call)


def test_the_public_op(launches):
    """One launch for all layers of one shape, whether keys are turned, in place or not; interleaved and HND pages."""
    both = [torch.randn(10, 2, 4, 2, 8).bfloat16() for _ in range(3)]
    table, lens, keep = torch.tensor([[5, 0, 9], [7, 2, 1]]), torch.tensor([11, 7]), torch.tensor([0, 1, 4, 6])
    free = torch.tensor([[3], [6]])
    for layout in ("NHD", "HND"):
        xs = both if layout == "NHD" else [x.transpose(2, 3).contiguous() for x in both]
        for options in ({}, {"rope": ck.Rope(INV_FREQ)}, {"out_block_table": free}):
            caches = [[x.clone() for x in xs] for _ in range(2)]
            results = []
            for name, cache in zip(("cpu", "triton"), caches, strict=True):
                pairs = zip(*[x.unbind(1) for x in cache], strict=True)
                with ck.use_backend(name):
                    results.append(ck.repack_paged_kv(tuple(pairs), table, lens, keep, layout=layout, **options))
            assert all(torch.equal(x, y) for x, y in zip(*caches, strict=True))
            for name in ("block_table", "seq_lens", "freed_blocks", "num_freed", "status"):
                assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert len(launches) == 6


def test_launches_and_no_host_reads(launches, monkeypatch):
    keys, values = pages_of(6, (6, 4, 2, 8)), pages_of(6, (6, 4, 2, 4))
    table, keep = torch.arange(6).view(2, 3), ascending(10, 5, 1, 1)
    angles = torch.randn(1, 1, 5, 4)
    plain, turned = call_of(keys, table, [10, 12], keep), call_of(keys, table, [10, 12], keep, angles, 3)
    both, own = call_of(keys + values, table, [10, 12], keep), call_of(keys, table, [10, 12], keep)
    own.keep, own.keep_of = [keep.clone() for _ in range(6)], [*range(6)]
    with NoHostReads():
        paged.repack_pages(*plain.args())
        paged.repack_pages(*turned.args())
        assert len(launches) == 2
        results = paged.repack_pages(*both.args())  # a launch per shape, tables made by the first
        assert len(launches) == 4
        monkeypatch.setattr(paged, "POINTERS", 10 + 2 + 6)  # two pointers per tensor
        paged.repack_pages(*own.args())
        assert len(launches) == 6
    assert results[1].tolist() == [5, 5]


def test_offsets_beyond_32_bits():
    """Blocks 2^30 elements and more apart: only the pages of their rows are ever touched."""
    for dtype, columns in ((torch.int8, 3), (torch.int16, 8)):
        base = torch.empty_strided((4, 3, 2, columns), (2**31 + 8, 2**30 + (columns == 3), 16, 1), dtype=dtype)
        base.copy_(torch.arange(24 * columns).view(4, 3, 2, columns))
        table, keep = torch.tensor([[3, 1, 0]]), torch.tensor([[[0, 2, 3, 4, 7]]])
        rows = torch.cat([base[i] for i in (3, 1, 0)])[keep.flatten()]
        ops._repack_pages([base], table.int(), torch.tensor([9]).int(), [keep], [0], [], [], [False], None)
        assert torch.equal(torch.cat([base[3], base[1]])[:5], rows)
