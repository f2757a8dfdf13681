"""repack_paged_kv: every layout, in place and into free blocks, turned; shared blocks; what it refuses."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_cases import assert_same, bits, oracle, random_call

import cacovid_kernels as ck
from cacovid_kernels.ops import paged

B, H, SIZE, D = 2, 3, 4, 8
LENGTHS = torch.tensor([11, 7])
TABLE = torch.tensor([[5, 0, 9], [7, 2, 1]])
FREE = torch.tensor([[3, 4], [6, 8]])
KEEP = torch.tensor([[0, 1, 4, 6, 10], [0, 3, 5, -1, -1]])
INV_FREQ = 10000.0 ** (-torch.arange(0, D, 2) / D)


@pytest.fixture
def cache():
    """Two layers of pages [blocks, block_size, H, D]."""
    return tuple([torch.randn(10, SIZE, H, size) for _ in range(2)] for size in (D, 5))


def dense(x, table, lens):
    """The rows of every sequence: [H, n, D] each."""
    return [
        torch.cat([x[i] for i in ids])[:n].transpose(0, 1) for ids, n in zip(table.tolist(), lens.tolist(), strict=True)
    ]


def clone(cache):
    return tuple([x.clone() for x in xs] for xs in cache)


# ---- against the oracle --------------------------------------------------------------------------


@hypothesis_settings(max_examples=400)
@given(seed=st.integers(0, 2**32), hostile=st.booleans(), in_place=st.booleans())
def test_one_step_per_row(seed, hostile, in_place):
    call = random_call(Random(seed), hostile, in_place)
    wanted = call.copy()
    expected = oracle(wanted)
    for backend in ("reference", "cpu"):
        if ck.backends()[backend]:
            continue
        with ck.use_backend(backend):
            found = call.copy()
            assert_same(found, paged._repack_pages(*found.args()), wanted, expected)


def test_threads_agree(threads):
    for seed in range(60):
        call = random_call(Random(seed), seed % 3 == 0, seed % 2 == 0)
        wanted = call.copy()
        assert_same(call, paged._repack_pages(*call.args()), wanted, oracle(wanted))


def test_long_sequences(threads):
    """Many tasks per thread, blocks in order and not, and rows beyond what a processor's caches hold."""
    size, kept = 16, 6000
    keep = torch.arange(0, 2 * kept, 2)
    for ids in (torch.arange(800), torch.randperm(800)):
        pages = torch.randn(800, size, 2, 64)
        wanted = dense(pages, ids[None], torch.tensor([12000]))[0][:, keep]
        result = ck.repack_paged_kv((pages, pages + 1), ids[None], torch.tensor([12000]), keep)
        assert torch.equal(dense(pages, result.block_table, result.seq_lens)[0], wanted)
        assert torch.equal(dense(result.values[0], result.block_table, result.seq_lens)[0], wanted + 1)


def test_any_table_is_memory_safe(backend):
    """Blocks listed twice and positions in any order: wrong rows, but all of them in blocks that the call names."""
    rng = Random(0)
    spared = 0
    for _ in range(100):
        call = random_call(rng, True, rng.random() < 0.7)
        call.block_table.random_(-1, call.pages[0].shape[0] + 1)
        for keep in call.keep:
            keep.random_(-2, call.block_table.shape[1] * call.pages[0].shape[1] + 2)
        wanted = call.copy()
        paged._repack_pages(*call.args())
        written = call.block_table if call.out_block_table is None else call.out_block_table
        named = sorted({block for block in written.flatten().tolist() if 0 <= block < call.pages[0].shape[0]})
        for x, y in zip(wanted.pages, call.pages, strict=True):
            x[named] = y[named]  # anything may stand there
            spared += x.shape[0] - len(named)
        for x, y in zip(wanted.bases, call.bases, strict=True):
            assert torch.equal(bits(x.contiguous()), bits(y.contiguous()))
    assert spared > 100


# ---- the public op -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NHD", "HND", "pages, 2", "2, pages"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_equals_repack_kv_of_the_rows(backend, cache, form, elsewhere):
    rows = [dense(x, TABLE, LENGTHS) for x in (*cache[0], *cache[1])]
    if form == "HND":
        passed = tuple([x.transpose(1, 2).contiguous() for x in xs] for xs in cache)
    elif form == "NHD":
        passed = clone(cache)
    else:
        axis = 1 if form == "pages, 2" else 0
        both = [torch.stack([k[..., :5], v], axis) for k, v in zip(*cache, strict=True)]
        passed = tuple(zip(*[x.unbind(axis) for x in both], strict=True))
        rows = [dense(x[..., :5], TABLE, LENGTHS) for x in (*cache[0], *cache[1])]
    out = FREE if elsewhere else None
    layout = "HND" if form == "HND" else "NHD"
    result = ck.repack_paged_kv(passed, TABLE, LENGTHS, KEEP, layout=layout, out_block_table=out)
    assert all(x is y for x, y in zip((*result.keys, *result.values), (*passed[0], *passed[1]), strict=True))
    assert result.seq_lens.tolist() == [5, 3]
    assert result.block_table.tolist() == ([[3, 4], [6, -1]] if elsewhere else [[5, 0], [7, -1]])
    assert result.freed_blocks.tolist() == ([[5, 0, 9], [7, 2, -1]] if elsewhere else [[9, -1, -1], [2, -1, -1]])
    assert result.num_freed.tolist() == ([3, 2] if elsewhere else [1, 1])
    assert result.status.tolist() == [0, 0]
    for before, x in zip(rows, (*result.keys, *result.values), strict=True):
        x = x if layout == "NHD" else x.transpose(1, 2)
        after = dense(x, result.block_table, result.seq_lens)
        for s, kept in enumerate(([0, 1, 4, 6, 10], [0, 3, 5])):
            (wanted,), _ = ck.repack_kv((before[s][None], before[s][None]), torch.tensor(kept))
            assert torch.equal(after[s], wanted[0])


def test_forms_of_keep(backend, cache):
    lens = torch.tensor([7, 7])
    scores = torch.randn(2, 5)
    chosen = ck.select_tokens(scores.flatten(), grid_thw=[(1, 1, 5)] * 2, num_tokens=2)
    prompt = torch.tensor([[False, *[True] * 5, False]] * 2)
    selection = chosen.within(prompt)
    rows = torch.stack(selection.indices.split(4)) - torch.tensor([[0], [7]])
    heads = rows[:, None].expand(2, H, 4).contiguous()
    wanted = None
    for keep in (rows, rows.int(), selection, heads, [rows, heads], [selection, selection], [rows, rows.clone()]):
        passed = clone(cache)
        result = ck.repack_paged_kv(passed, TABLE.int(), lens.int(), keep)
        assert result.seq_lens.tolist() == [4, 4]
        wanted = wanted or result
        assert all(
            torch.equal(x, y)
            for x, y in zip((*result.keys, *result.values), (*wanted.keys, *wanted.values), strict=True)
        )
    one = ck.repack_paged_kv((cache[0][0], cache[1][0]), TABLE, lens, torch.tensor([1, 2]))
    assert len(one.keys) == 1
    assert one.keys[0] is cache[0][0]
    single = ck.select_tokens(torch.randn(7), grid_thw=[(1, 1, 7)], num_tokens=2)
    alone = ck.repack_paged_kv((cache[0][1], cache[1][1]), TABLE[:1], lens[:1], single)
    assert alone.seq_lens.tolist() == [2]


def test_per_head_rows(backend, cache):
    keep = torch.stack([torch.stack([torch.randperm(7)[:3].sort().values for _ in range(H)]) for _ in range(B)])
    rows = [dense(x, TABLE, LENGTHS) for x in cache[0]]
    result = ck.repack_paged_kv(cache, TABLE, LENGTHS, keep)
    for before, x in zip(rows, result.keys, strict=True):
        for s, after in enumerate(dense(x, result.block_table, result.seq_lens)):
            assert all(torch.equal(after[h], before[s][h, keep[s, h]]) for h in range(H))


@pytest.mark.parametrize("turn", [False, True])
def test_shared_prefix_blocks_survive(backend, cache, turn):
    """Two sequences with one first block: all of its rows stay, turned by no angle, so that nobody writes it."""
    table = torch.tensor([[5, 0, 9], [5, 2, 1]])
    keep = torch.tensor([[0, 1, 2, 3, 5, 9], [0, 1, 2, 3, 6, -1]])
    before, rows = clone(cache), [dense(x, table, LENGTHS) for x in cache[1]]
    cache[0][0][5, 1] = before[0][0][5, 1] = float("inf")  # a product with 0 would be NaN
    rope = ck.Rope(INV_FREQ) if turn else None
    result = ck.repack_paged_kv(cache, table, LENGTHS, keep, rope=rope)
    assert all(
        torch.equal(x[5], y[5]) for xs, ys in zip(cache, before, strict=True) for x, y in zip(xs, ys, strict=True)
    )
    for was, x in zip(rows, result.values, strict=True):
        for s, after in enumerate(dense(x, result.block_table, result.seq_lens)):
            assert torch.equal(after, was[s][:, keep[s][keep[s] >= 0]])
    assert result.freed_blocks.tolist() == [[9, -1, -1], [-1, -1, -1]]
    # A block that one sequence gives up may become another's no more, but it may be dropped by both.
    dropped = torch.tensor([[9, 5, 0], [2, 5, 1]])
    result = ck.repack_paged_kv(clone(before), dropped, LENGTHS, torch.tensor([[0, 1, 8], [0, 1, -1]]))
    assert result.freed_blocks.tolist() == [[5, 0, -1], [5, -1, -1]]


def test_sequences_that_end_empty_or_are_not_there(backend, cache):
    before = clone(cache)
    result = ck.repack_paged_kv(cache, TABLE, torch.tensor([0, 7]), torch.tensor([[-1, -1], [-1, -1]]))
    assert result.block_table.tolist() == [[-1], [-1]]
    assert result.num_freed.tolist() == [0, 2]
    assert result.freed_blocks[1].tolist() == [7, 2, -1]
    assert torch.equal(cache[0][0], before[0][0])
    none = ck.repack_paged_kv(cache, TABLE[:0], LENGTHS[:0], torch.tensor([0, 1]))
    assert none.block_table.shape == (0, 1)
    assert none.freed_blocks.shape == (0, 3)


def test_keys_are_turned_as_repack_kv_turns_them(backend, cache):
    rows = [dense(x, TABLE, LENGTHS) for x in cache[0]]
    positions = torch.arange(12) * 3
    for rope in (
        ck.Rope(INV_FREQ),
        ck.Rope(INV_FREQ, positions),
        ck.Rope(INV_FREQ[:2], positions[:11], torch.arange(5)),
    ):
        result = ck.repack_paged_kv(clone(cache), TABLE, LENGTHS, KEEP, rope=rope)
        for before, x in zip(rows, result.keys, strict=True):
            after = dense(x, result.block_table, result.seq_lens)
            old = rope.positions if rope.positions is None else rope.positions[:11]
            turned = ck.Rope(rope.inv_freq, old, rope.new_positions)
            (wanted,), _ = ck.repack_kv((before[0][None], before[0][None]), KEEP[0], rope=turned)
            assert torch.equal(after[0], wanted[0])


def test_values_beyond_int32_stay_out_of_range(cache):
    with pytest.raises(IndexError, match=r"block_table holds 2147483647 where rows are kept"):
        ck.repack_paged_kv(cache, TABLE + 2**32, LENGTHS, KEEP)
    with pytest.raises(ValueError, match=r"seq_lens must be in \[0, M \* block_size = 12\]"):
        ck.repack_paged_kv(cache, TABLE, LENGTHS + 2**32, KEEP)


def test_autograd_notices_the_move(cache):
    version = cache[0][0]._version
    ck.repack_paged_kv(cache, TABLE, LENGTHS, KEEP)
    assert cache[0][0]._version > version
    with torch.inference_mode():
        ck.repack_paged_kv(clone(cache), TABLE, LENGTHS, KEEP)


# ---- refusals ------------------------------------------------------------------------------------


def test_errors(cache):
    key, value = cache[0][0], cache[1][0]
    shared = torch.tensor([[5, 0, 9], [5, 2, 1]])
    both = torch.randn(10, SIZE, H, 2 * D)
    rope = ck.Rope(INV_FREQ)
    chosen = ck.select_tokens(torch.randn(9), grid_thw=[(1, 3, 3)], num_tokens=2)

    def call(cache=cache, table=TABLE, lens=LENGTHS, keep=KEEP, **options):
        return lambda: ck.repack_paged_kv(cache, table, lens, keep, **options)

    for error, message, attempt in [
        (TypeError, r"cache is a Tensor, it must be \(keys, values\)", call(key)),
        (TypeError, r"cache is a list", call([key])),
        (ValueError, r"cache has 2 keys and 1 values", call((cache[0], cache[1][:1]))),
        (TypeError, r"keys of layer 0 must be a strided tensor, .*got str", call((["key"], [value]))),
        (TypeError, r"neither complex", call((key * 1j, value))),
        (ValueError, r"values of layer 0 must be \[blocks, block_size, H, D\]", call((key, value[:, :2]))),
        (ValueError, r"keys of layer 1 must be \[blocks, H, block_size, D\]",
         call(([key, key[:9]], [value, value]), layout="HND")),
        (ValueError, r"values of layer 0 hold nothing", call((key, value[..., :0]))),
        (ValueError, r"memory of its own", call((key[:, :, :1].expand(10, SIZE, H, D), value))),
        (ValueError, r"two of the tensors share memory", call((key, key))),
        (ValueError, r"two of the tensors share memory", call((both[..., :9], both[..., 8:]))),
        (ValueError, r"layout='NDH' must be one of \['NHD', 'HND'\]", call(layout="NDH")),
        (RuntimeError, r"has no gradient, but keys of layer 0", call((key.clone().requires_grad_(), value))),
        (TypeError, r"block_table must be an int32 or int64 tensor \(block_table: list\)", call(table=[[1]])),
        (TypeError, r"seq_lens must be an int32 or int64 tensor .*float32", call(lens=LENGTHS.float())),
        (ValueError, r"block_table must be \[B, M\]", call(table=TABLE[0])),
        (ValueError, r"seq_lens must be \[2\] \(seq_lens: \[1\] int64 cpu\)", call(lens=LENGTHS[:1])),
        (ValueError, r"out_block_table must be \[2, M\]", call(out_block_table=FREE[:1])),
        (ValueError, r"block_table \[2, 1\] has room for 4 rows of a sequence, keep has 5",
         call(table=TABLE[:, :1], lens=LENGTHS[1:].expand(2), keep=torch.tensor([0, 1, 2, 3, -1]))),
        (ValueError, r"out_block_table \[2, 1\] has room for 4 rows", call(out_block_table=FREE[:, :1])),
        (ValueError, r"seq_lens must be in \[0, M \* block_size = 12\], it holds 7 to 13",
         call(lens=torch.tensor([13, 7]))),
        (ValueError, r"it holds -1 to 7", call(lens=torch.tensor([-1, 7]))),
        (ValueError, r"keep must ascend without duplicates, it holds 4 before 1", call(keep=torch.tensor([4, 1]))),
        (IndexError, r"keep holds 12, positions must be in \[0, 12\)", call(keep=torch.tensor([1, 12]))),
        (IndexError, r"keep holds 7 for sequence 1, which has 7 rows", call(keep=torch.tensor([1, 7]))),
        (ValueError, r"keep is empty", call(keep=KEEP[:, :0])),
        (TypeError, r"keep must be int64 or int32", call(keep=KEEP > 0)),
        (TypeError, r"keep holds a RaggedKeep", call(keep=ck.RaggedKeep.from_lists([[KEEP[0]] * H] * B))),
        (TypeError, r"keep holds a list", call(keep=[[KEEP[0]] * H] * B)),
        (TypeError, r"keep holds a int", call(keep=3)),
        (ValueError, r"keep has 3 entries for 2 layers", call(keep=[KEEP] * 3)),
        (ValueError, r"keep must be \[K\], \[B, K\] or \[B, H, K\]", call(keep=KEEP.expand(3, 2, 5))),
        (ValueError, r"the selection covers 9 tokens", call(keep=chosen)),
        (ValueError, r"all layers must keep equally many rows, got \[5, 4\]",
         call(keep=[KEEP, torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]])])),
        (ValueError, r"all heads and layers of a sequence must keep equally many rows",
         call(keep=torch.tensor([[[0, 1], [2, 3], [4, -1]]]).expand(2, 3, 2))),
        (ValueError, r"all heads and layers of a sequence",
         call(keep=[KEEP, torch.tensor([[0, 1, 4, 6, 10], [0, 3, 5, 6, -1]])])),
        (IndexError, r"block_table holds -1 where rows are kept, block ids must be in \[0, 10\)",
         call(table=torch.tensor([[5, 0, -1], [7, 2, 1]]))),
        (IndexError, r"block_table holds 10", call(table=torch.tensor([[5, 0, 9], [10, 2, 1]]))),
        (IndexError, r"out_block_table holds 10", call(out_block_table=torch.tensor([[3, 10], [6, 8]]))),
        (ValueError, r"block 5 would be written, but is used more than once. Copy it first", call(table=shared)),
        (ValueError, r"block 5 would be written, .* Copy it first",
         call(table=shared, keep=torch.tensor([0, 1, 2, 3, 5]), rope=ck.Rope(INV_FREQ, None, torch.arange(5) + 1))),
        (ValueError, r"block 0 would be written", call(table=torch.tensor([[0, 0, 9], [7, 2, 1]]))),
        (ValueError, r"block 3 would be written, .* Pass free blocks",
         call(out_block_table=torch.tensor([[3, 4], [3, 8]]))),
        (ValueError, r"block 9 would be written, .* Pass free blocks",
         call(out_block_table=torch.tensor([[3, 4], [9, 8]]))),
        (TypeError, r"rope needs floating keys", call((key.int(), value), rope=rope)),
        (ValueError, r"inv_freq must be \[R / 2\] with R at most the head size 5", call(cache[::-1], rope=rope)),
        (IndexError, r"keep holds 10, rope.positions says where 9 positions are",
         call(rope=ck.Rope(INV_FREQ, torch.arange(9)))),
    ]:  # fmt: skip
        before = clone(cache)
        with pytest.raises(error, match=message) as caught:
            attempt()
        assert str(caught.value).startswith("repack_paged_kv: ")
        assert "\n" not in str(caught.value)
        assert torch.equal(cache[0][0], before[0][0])


def test_views_that_interleave_share_nothing(cache):
    both = torch.randn(10, SIZE, H, 2 * D)
    every_layer = torch.randn(10, 2, 2, SIZE, H, D)  # blocks, layers, keys and values
    for passed in (
        (both[..., :D], both[..., D:]),
        (both[..., :3], both[..., 3:]),
        ([x[:, 0] for x in every_layer.unbind(1)], [x[:, 1] for x in every_layer.unbind(1)]),
        (both.view(10, 2, SIZE // 2, H, 2 * D)[:, 0], both.view(10, 2, SIZE // 2, H, 2 * D)[:, 1]),
    ):
        ck.repack_paged_kv(passed, TABLE, torch.tensor([6, 5]), torch.tensor([0, 3]))
    shifted = (
        both.flatten()[: 9 * SIZE * H * D + 1][1:].view(9, SIZE, H, D),
        both.flatten()[: 9 * SIZE * H * D].view(9, SIZE, H, D),
    )
    with pytest.raises(ValueError, match="share memory"):
        ck.repack_paged_kv(shifted, TABLE % 9, LENGTHS, torch.tensor([0]))


# ---- graphs --------------------------------------------------------------------------------------


def test_nothing_is_read_on_the_host():
    """On meta tensors every host read is an error, inside the op too."""
    cache = [torch.zeros(10, SIZE, H, D, device="meta") for _ in range(2)]
    table, lens, keep = TABLE.to("meta"), LENGTHS.to("meta"), KEEP.to("meta")
    with ck.use_backend("reference"):
        for options in ({}, {"rope": ck.Rope(INV_FREQ)}, {"out_block_table": FREE.to("meta")}):
            result = ck.repack_paged_kv(cache, table, lens, keep, **options)
            assert result.block_table.shape == (B, 2)
            assert result.freed_blocks.shape == (B, 3)
            assert result.status.dtype == result.num_freed.dtype == torch.int32


@pytest.mark.parametrize("in_place", [True, False])
def test_opcheck(in_place):
    calls = (random_call(Random(seed), False, in_place) for seed in range(100))
    call = next(call for call in calls if len(call.pages) > 1 and all(call.rotated))  # no bits without a value
    torch.library.opcheck(paged._repack_pages.dispatch, call.args())


@pytest.mark.parametrize("form", ["NHD", "HND", "pages, 2"])
def test_compiles_whole(form):
    def step(xs, table, lens, keep, inv_freq):
        cache = xs[0].unbind(1) if form == "pages, 2" else (xs[:2], xs[2:])
        kept = ck.repack_paged_kv(
            cache, table, lens, keep, rope=ck.Rope(inv_freq), layout="HND" if form == "HND" else "NHD"
        )
        return kept.keys[0] + 1, kept.block_table, kept.seq_lens * 2, kept.freed_blocks, kept.num_freed, kept.status

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for blocks, size, k in [(9, 4, 4), (12, 5, 7), (13, 3, 6)]:
        shape = [blocks, size, H, D] if form != "HND" else [blocks, H, size, D]
        xs = [torch.randn(blocks, 2, size, H, D)] if form == "pages, 2" else [torch.randn(shape) for _ in range(4)]
        table = torch.randperm(blocks)[:8].view(2, 4)
        lens = torch.tensor([4 * size, 3 * size - 1])
        keep = torch.randperm(3 * size - 1)[:k].sort().values
        copies = [x.clone() for x in xs]
        wanted, found = step(xs, table, lens, keep, INV_FREQ), compiled(copies, table, lens, keep, INV_FREQ)
        assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, copies, strict=True))
