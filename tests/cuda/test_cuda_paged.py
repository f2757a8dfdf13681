"""Compaction of paged caches in CUDA against the CPU engine: the same bits in all memory, the same tables."""

from __future__ import annotations

from random import Random

import pytest
import torch
from paged_cases import Call, assert_same, oracle, random_call

import cacovid_kernels as ck
from cacovid_kernels.ops import paged as ops

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


@pytest.mark.parametrize("hostile", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_random_calls(hostile, in_place):
    for seed in range(150):
        check(random_call(Random(f"{seed} {in_place}"), hostile, in_place))


@pytest.mark.parametrize("in_place", [True, False])
def test_one_step_per_row(in_place):
    for seed in range(40):
        call = random_call(Random(f"oracle {seed}"), seed % 2 == 0, in_place)
        wanted = call.copy()
        expected = oracle(wanted)
        assert_same(call, ops._repack_pages(*call.args()), wanted, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_odd_floats_are_turned_with_the_bits_of_the_engine(dtype):
    """Every value of 16 bits, among them subnormals, infinities and NaN."""
    values = torch.arange(0, 65536, dtype=torch.int32).to(torch.int16).view(32, 16, 1, 128).view(dtype)
    table, keep, angles = torch.randperm(32)[None], ascending(512, 300, 1, 1), torch.randn(1, 1, 300, 64)
    check(call_of([values.clone()], table, [512], keep, angles, 1))


@pytest.mark.parametrize("turned", [0, 2])
@pytest.mark.parametrize("in_place", [True, False])
def test_walks_of_several_steps(turned, in_place):
    """More rows than a block moves in a step, most of them close to where they were."""
    table = torch.randperm(100)
    where = None if in_place else table[60:].view(2, 20).int()
    for width, dtype in ((64, torch.bfloat16), (136, torch.float32)):
        xs = pages_of(3, (100, 16, 2, width), dtype)
        keep = ascending(460, 310, 2, 2)
        keep[0, :, 290:] = -1
        check(call_of(xs, table[:60].view(2, 30), [460, 470], keep, torch.randn(2, 1, 310, 32), turned, where))
    xs = pages_of(2, (100, 16, 2, 64))
    check(
        call_of(xs, table[:60].view(2, 30), [460, 470], ascending(460, 440, 1, 1), torch.zeros(1, 1, 440, 32), turned)
    )


def test_long_tables():
    """More blocks and rows than a block of threads counts at a time."""
    table = torch.randperm(6000).view(2, 3000)
    xs = [torch.randint(0, 256, (6000, 1, 1, 4), dtype=torch.uint8)]
    keep = ascending(1400, 1100, 1, 1)
    check(call_of([xs[0].clone()], table[:, :1500], [1400, 1500], keep))
    keep = torch.cat([keep[..., :1030], torch.full((1, 1, 200), -1)], -1)
    check(call_of(xs, table[:, :1400], [1400, 1399], keep, where=table[:, 1500:2730]))


@pytest.mark.parametrize("turned", [0, 2])
def test_shared_prefixes_are_not_written(turned):
    table, keep = torch.tensor([[5, 0, 9], [5, 2, 1]]), torch.tensor([[[0, 1, 2, 3, 5, 9]], [[0, 1, 2, 3, 6, -1]]])
    xs = pages_of(4, (10, 4, 2, 8))
    xs[0][5, 1] = float("inf")  # times a sine of zero it would be NaN
    before = [x.clone() for x in xs]
    angles = (torch.arange(6) - keep.clamp(min=0))[..., None] * INV_FREQ
    check(call_of(xs, table, [11, 7], keep, angles, turned))
    assert all(torch.equal(x[5], y[5]) for x, y in zip(xs, before, strict=True))


def test_a_row_stays_only_if_none_of_its_angles_turns_it():
    """One angle among many, in a column that another thread or another piece of the row has."""
    for column in (0, 7, 8, 63, 64, 255, 500):
        xs = pages_of(1, (3, 4, 1, 1040))
        xs[0][0, 2] = -0.0
        angles = torch.zeros(1, 1, 8, 512)
        angles[0, 0, 2, column] = 1.0
        keep = torch.tensor([[[0, 1, 2, 3, 4, 6, 8, -1]]])
        check(call_of(xs, torch.tensor([[0, 2, 1]]), [12], keep, angles, 1))


def test_tables_that_lie_touch_nothing_else():
    """On a GPU nobody reads tables or positions before the kernels do."""
    rng = Random(0)
    for seed in range(60):
        call = random_call(Random(seed), True, seed % 2 == 0)
        call.block_table.random_(-1, call.pages[0].shape[0] + 1)
        for keep in call.keep:
            keep.random_(-2, call.block_table.shape[1] * call.pages[0].shape[1] + 2)
            keep.view(-1)[rng.randrange(keep.numel())] = rng.choice([2**62, -(2**63), 2**31, 2**32])
        memory = [torch.full((3, base.untyped_storage().nbytes()), 7, dtype=torch.uint8) for base in call.bases]
        call.pages = [
            torch.empty(0, dtype=x.dtype).set_(
                m.untyped_storage(), m.shape[1] // x.element_size() + x.storage_offset(), x.shape, x.stride()
            )
            for m, x in zip(memory, call.pages, strict=True)
        ]
        ops._repack_pages(*call.args())
        assert all((m[::2] == 7).all() for m in memory)


@pytest.mark.parametrize("in_place", [True, False])
def test_more_lists_and_tensors_than_one_launch_takes(in_place):
    """The status speaks of the lists of all launches."""
    torch.manual_seed(0)
    layers, table = 150, torch.randperm(12)
    xs = pages_of(layers, (12, 2, 1, 8)) + pages_of(layers, (12, 2, 1, 4))
    keep = [ascending(5, 3, 2, 1) for _ in range(layers)]
    keep[3][0, 0, 2] = keep[140][1, 0, 2] = 7  # behind the end of a sequence, in the first launch and in the last
    cos, sin = [torch.randn(1, 1, 3, 2) for _ in keep], [torch.randn(1, 1, 3, 2) for _ in keep]
    lens, where = torch.tensor([6, 5]).int(), None if in_place else table[6:].view(2, 3).int()
    rotated = [True] * layers + [False] * layers
    call = Call(xs, xs, table[:6].view(2, 3).int(), lens, keep, [*range(layers)] * 2, cos, sin, rotated, where)
    wanted = call.copy()
    with ck.use_backend("cpu"):
        expected = ops._repack_pages(*wanted.args())
    found = ops._repack_pages(*call.args())
    assert found[-1].tolist() == [8, 8]
    assert_same(call, found, wanted, expected)


def test_through_the_public_function():
    cache = pages_of(2, (10, 4, 3, 8), torch.bfloat16), pages_of(2, (10, 4, 3, 5), torch.bfloat16)
    table, lens = torch.tensor([[5, 0, 9], [7, 2, 1]]), torch.tensor([11, 7])
    keep = torch.tensor([[0, 1, 4, 6, 10], [0, 3, 5, -1, -1]])
    for layout, where in (("NHD", None), ("NHD", torch.tensor([[3, 4], [6, 8]])), ("HND", None)):
        results = []
        for backend in ("cpu", "cuda"):
            passed = tuple(
                [x.clone() if layout == "NHD" else x.transpose(1, 2).contiguous() for x in xs] for xs in cache
            )
            with ck.use_backend(backend):
                results.append(
                    ck.repack_paged_kv(
                        passed, table, lens, keep, layout=layout, out_block_table=where, rope=ck.Rope(INV_FREQ)
                    )
                )
        for x, y in zip((*results[0].keys, *results[0].values), (*results[1].keys, *results[1].values), strict=True):
            assert torch.equal(x.view(torch.int16), y.view(torch.int16))
        for name in ("block_table", "seq_lens", "freed_blocks", "num_freed", "status"):
            assert torch.equal(getattr(results[0], name), getattr(results[1], name))
