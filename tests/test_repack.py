"""repack_kv: every dtype and stride, in place, ragged, rotated; what it refuses. Hugging Face: test_repack_hf.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels._bits import as_bits
from cacovid_kernels.ops import repack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
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
needs_engine = pytest.mark.skipif(bool(ck.backends()["cpu"]), reason=ck.backends()["cpu"])


def random_bits(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.zeros((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1)


def same(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def memory_order(x, axes):
    """The same values, but the axes lie in memory in the order `axes`."""
    back = sorted(range(x.dim()), key=lambda d: axes[d])
    return x.permute(axes).clone(memory_format=torch.contiguous_format).permute(back)


def layouts(x):
    """The values of x in several memory layouts, with garbage between and around them."""
    yield x.clone()
    yield memory_order(x, (0, 2, 1, 3))  # [B, N, H, D]
    yield memory_order(x, (3, 0, 2, 1))  # no row is contiguous
    wide = random_bits([n + 2 for n in x.shape], x.dtype, seed=1)
    yield wide[1:-1, 1:-1, 1:-1, 1:-1].copy_(x)
    yield random_bits([x.numel() + 1], x.dtype, seed=2)[1:].view(x.shape).copy_(x)


def rows(x, keep):
    """One Python step per row: [B, H, N, D] and [b, h, K] -> [B, H, K, D]."""
    b, h, n, d = x.shape
    keep = keep.expand(b, h, -1)
    out = torch.zeros(b, h, keep.shape[2], d, dtype=as_bits(x).dtype)
    for i in range(b):
        for j in range(h):
            for k, at in enumerate(keep[i, j].tolist()):
                if 0 <= at < n:
                    out[i, j, k] = as_bits(x)[i, j, at]
    return out.view(x.dtype)


def moved(x, keep, placement, zero_tail=False):
    repack._repack_rows_([x], [keep], [], [0], [], [], [False], [placement], zero_tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_copied_bit_for_bit(backend, dtype):
    for columns in (1, 2, 16, 33, 64):
        full = random_bits((2, 3, 9, columns), dtype)
        for x in layouts(full):
            for name, keep in KEEP.items():
                (result,) = repack._repack_rows([x], [keep], [], [0], [], [], [False])
                assert result.is_contiguous()
                assert same(result, rows(full, keep)), (columns, x.stride(), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_in_place_gives_the_same_rows_and_touches_nothing_else(backend, dtype):
    for columns in (1, 16, 33):
        full = random_bits((2, 3, 9, columns), dtype)
        for name, keep in KEEP.items():
            if name == "outside":
                continue
            wanted, kept = rows(full, keep), keep.shape[2]
            for x in layouts(full):
                moved(x, keep, repack.IN_HEADS, zero_tail=True)
                assert same(x[:, :, :kept], wanted), (columns, x.stride(), name)
                assert not as_bits(x)[:, :, kept:].any()
            x = full.clone()
            moved(x, keep, repack.IN_FRONT)
            assert same(x.flatten()[: wanted.numel()].view(wanted.shape), wanted), (columns, name)
            assert same(x.flatten()[wanted.numel() :], full.flatten()[wanted.numel() :]) or kept < 9
    surroundings = random_bits((2, 5, 12, 8), torch.float32)
    x = surroundings[:, 1:4, 2:11]
    before = surroundings.clone()
    moved(x, KEEP["some"], repack.IN_HEADS)
    assert same(x[:, :, :4], rows(before[:, 1:4, 2:11], KEEP["some"]))
    before[:, 1:4, 2:11] = surroundings[:, 1:4, 2:11]
    assert same(surroundings, before)


@needs_engine
def test_no_row_is_overwritten_before_it_is_read():
    """10,000 random caches and keep lists, moved in place in both ways."""
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(1, high + 1, (), generator=generator))

    for case in range(10_000):
        b, h, n, d = draw(2), draw(3), draw(12), draw(5)
        shared = case % 3 == 0
        k = draw(n)
        lists = [torch.randperm(n, generator=generator)[:k].sort().values for _ in range(1 if shared else b * h)]
        keep = torch.stack(lists).view(1 if shared else b, 1 if shared else h, k)
        full = torch.arange(b * h * n * d, dtype=torch.int32).view(b, h, n, d)
        wanted = full.gather(2, keep.expand(b, h, k)[..., None].expand(b, h, k, d))
        x, y = full.clone(), full.clone()
        moved(x, keep, repack.IN_HEADS)
        moved(y, keep, repack.IN_FRONT)
        assert torch.equal(x[:, :, :k], wanted)
        assert torch.equal(y.flatten()[: wanted.numel()], wanted.flatten())


@needs_engine
def test_many_layers_and_threads(threads):
    torch.manual_seed(0)
    keys = [torch.randn(2, 4, 200 + 10 * i, 64).bfloat16() for i in range(5)]
    values = [torch.randn(2, 4, 200 + 10 * i, 48) for i in range(5)]
    keep = [
        torch.stack([torch.randperm(200)[: 30 + i].sort().values for _ in range(8)]).view(2, 4, -1) for i in range(5)
    ]
    wanted = [rows(x, keep[i % 5]) for i, x in enumerate(keys + values)]
    result = ck.repack_kv((keys, values), keep)
    assert all(same(a, b) for a, b in zip(result[0] + result[1], wanted, strict=True))
    result = ck.repack_kv((keys, values), keep, inplace=True)
    assert all(same(a, b) for a, b in zip(result[0] + result[1], wanted, strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(result[0] + result[1], keys + values, strict=True))


@needs_engine
def test_caches_beyond_the_processors_own(threads):
    # 10 MB and more of results: streaming stores.
    x = random_bits((1, 4, 30_000, 64), torch.int32)
    keep = torch.arange(0, 30_000, 2)
    wanted = x[:, :, keep]
    assert torch.equal(ck.repack_kv((x, x.clone()), keep)[0][0], wanted)
    assert torch.equal(ck.repack_kv((x, x.clone()), keep, inplace=True)[0][0], wanted)


# ---- ways to say what is kept --------------------------------------------------------------------


@pytest.fixture
def cache():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 12, 8) for _ in range(2)], [torch.randn(2, 3, 12, 4) for _ in range(2)]


def all_rows(cache, keeps):
    return tuple([rows(x, keep) for x, keep in zip(xs, keeps, strict=True)] for xs in cache)


def equal(a, b):
    return all(same(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


def test_forms_of_keep(backend, cache):
    one = torch.tensor([0, 5, 11])
    batch = torch.tensor([[0, 5, 11], [1, 2, -1]])
    heads = torch.stack([torch.randperm(12)[:4].sort().values for _ in range(6)]).view(2, 3, 4)
    for keep, shape in [(one, (1, 1, 3)), (batch, (2, 1, 3)), (heads, (2, 3, 4)), (one.int(), (1, 1, 3))]:
        assert equal(ck.repack_kv(cache, keep), all_rows(cache, [keep.view(shape)] * 2))
    assert equal(ck.repack_kv(cache, [one, heads]), all_rows(cache, [one.view(1, 1, 3), heads]))
    single = ck.repack_kv((cache[0][0], cache[1][0]), one)
    assert same(single[0][0], cache[0][0][:, :, one])
    other = [torch.randn(2, 6, 9, 8)]  # layers may differ in heads and length
    mixed = ck.repack_kv((cache[0][:1] + other, cache[1][:1] + other), torch.tensor([1, 8]))
    assert same(mixed[0][1], other[0][:, :, [1, 8]])


def test_selections(backend, cache):
    shared = ck.select_tokens(torch.randn(12), grid_thw=[(2, 2, 3)], keep_ratio=0.4)
    assert equal(ck.repack_kv(cache, shared), all_rows(cache, [shared.indices.view(1, 1, -1)] * 2))
    rows_of_two = ck.select_tokens(torch.randn(24), grid_thw=[(1, 3, 4), (2, 2, 3)], num_tokens=[5, 3])
    padded = torch.full((2, 1, 5), -1)
    padded[0, 0] = rows_of_two.indices[:5]
    padded[1, 0, :3] = rows_of_two.indices[5:] - 12
    assert equal(ck.repack_kv(cache, rows_of_two), all_rows(cache, [padded] * 2))
    prompt = torch.zeros(2, 12, dtype=torch.bool)
    prompt[0, 2:8] = prompt[1, 4:10] = True
    video = ck.select_tokens(torch.randn(12), grid_thw=[(1, 2, 3)] * 2, num_tokens=2).within(prompt)
    result = ck.repack_kv(cache, video)
    assert same(result[0][0][1], cache[0][0][1][:, video.indices[8:] - 12])


def test_heads_may_keep_different_numbers(backend, cache):
    lists = [[torch.randperm(12)[: 1 + 2 * h + b].sort().values for h in range(3)] for b in range(2)]
    lists[1][0] = lists[1][0][:0]  # a head may keep nothing
    mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            mask[b, h, lists[b][h]] = True
    total = int(mask.sum())
    ragged = ck.RaggedKeep.from_lists(lists)
    from_mask = ck.RaggedKeep.from_mask(mask, total)
    assert torch.equal(ragged.indices, from_mask.indices)
    assert torch.equal(ragged.cu_seqlens, from_mask.cu_seqlens)
    for keep in (lists, ragged, [ragged, from_mask], [lists, lists]):
        packed = ck.repack_kv(cache, keep)
        assert (packed.batch, packed.heads) == (2, 3)
        assert packed.nbytes == 2 * total * (8 + 4) * 4
        for layer in range(2):
            assert packed.keys[layer].shape == (total, 8)
            assert packed.cu_seqlens[layer].dtype == torch.int32
            for b in range(2):
                for h in range(3):
                    key, value = packed.head(layer, b, h)
                    assert same(key, cache[0][layer][b, h, lists[b][h]])
                    assert same(value, cache[1][layer][b, h, lists[b][h]])
    spread = tuple([memory_order(x, (0, 2, 1, 3)) for x in xs] for xs in cache)
    other = ck.repack_kv(spread, ragged)
    assert all(same(a, b) for a, b in zip(packed.keys + packed.values, other.keys + other.values, strict=True))


def test_packed_heads_attend_as_masked_ones():
    torch.manual_seed(0)
    key, value, query = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 1, 8)
    mask = torch.rand(2, 3, 12) < 0.5
    mask[..., 0] = True
    packed = ck.repack_kv((key, value), ck.RaggedKeep.from_mask(mask, int(mask.sum())))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, :, None])
    for b in range(2):
        for h in range(3):
            k, v = packed.head(0, b, h)
            ours = torch.nn.functional.scaled_dot_product_attention(query[b, h], k, v)
            torch.testing.assert_close(ours, wanted[b, h])


# ---- memory --------------------------------------------------------------------------------------


def bytes_held(tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors)


def test_memory_is_returned(backend, cache):
    keep = torch.tensor([1, 4, 7])
    wanted = all_rows(cache, [keep.view(1, 1, 3)] * 2)
    tensors = cache[0] + cache[1]
    before = bytes_held(tensors)
    view = ck.repack_kv((cache[0][:1], cache[1][:1]), keep, inplace=True)
    assert bytes_held(tensors) == before  # views: the memory stays
    assert view[0][0].is_contiguous()
    cache = ([x.clone() for x in cache[0]], [x.clone() for x in cache[1]])
    cache[0][0].copy_(torch.randn(2, 3, 12, 8))
    wanted = all_rows(cache, [keep.view(1, 1, 3)] * 2)
    result = ck.repack_kv(cache, keep, inplace=True, release=True)
    assert equal(result, wanted)
    assert all(a is b for a, b in zip(result[0] + result[1], cache[0] + cache[1], strict=True))
    assert bytes_held(cache[0] + cache[1]) == before * 3 // 12
    grown = torch.cat([cache[0][0], torch.zeros(2, 3, 1, 8)], 2)
    assert same(grown[:, :, :3], wanted[0][0])


def test_ragged_memory_is_returned(backend, cache):
    lists = [[torch.arange(12)[h :: 2 + b] for h in range(3)] for b in range(2)]
    total = sum(x.numel() for row in lists for x in row)
    wanted = ck.repack_kv(cache, lists)
    packed = ck.repack_kv(cache, lists, inplace=True, release=True)
    assert equal((packed.keys, packed.values), (wanted.keys, wanted.values))
    assert bytes_held(packed.keys + packed.values) == packed.nbytes == 2 * total * (8 + 4) * 4
    assert packed.keys[0] is cache[0][0]


@needs_engine
def test_no_second_cache_in_place():
    code = """
import resource
import torch
import cacovid_kernels as ck
torch.set_num_threads(1)
tiny = [torch.zeros(1, 1, 4, 4)]
ck.repack_kv((tiny, tiny), torch.tensor([1]))
cache = tuple([torch.ones(1, 4, 20000, 64) for _ in range(6)] for _ in range(2))  # 235 MiB
keep = torch.arange(0, 20000, 2)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
ck.repack_kv(cache, keep, inplace=True, release=True)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - peak
freed = before - resident()
assert grown < 40 and freed > 100, (grown, freed)  # half a cache is 117 MiB
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CACOVID_BACKEND": "cpu"})


def test_memory_in_use_elsewhere_is_not_returned(cache):
    keep = torch.tensor([1])
    other = cache[1][1][:, :, 2:]
    with pytest.raises(ValueError, match=r"tensor 3 of the cache cannot shrink: 2 tensors use its memory"):
        ck.repack_kv(cache, keep, inplace=True, release=True)
    assert other.shape[2] == 10
    part = torch.randn(2, 3, 20, 8)[:, :, :12]
    with pytest.raises(ValueError, match=r"tensor 0 of the cache cannot shrink"):
        ck.repack_kv(([part], [torch.randn(2, 3, 12, 8)]), keep, inplace=True, release=True)


def test_autograd_notices_the_move(cache):
    versions = [x._version for x in cache[0]]
    ck.repack_kv(cache, torch.tensor([1]), inplace=True)
    assert all(x._version > v for x, v in zip(cache[0], versions, strict=True))
    with torch.inference_mode():
        ck.repack_kv(
            ([torch.randn(1, 1, 4, 2)], [torch.randn(1, 1, 4, 2)]), torch.tensor([1]), inplace=True, release=True
        )


# ---- rotary positions ----------------------------------------------------------------------------


def rotated(x, positions, inv_freq, axes=None):
    """rotate_half from scratch, in float64: [B, H, N, D] at positions [.., N] or [A, B, N]."""
    positions = positions.double()
    if positions.dim() == 3:
        angle = positions.movedim(0, -1)[..., torch.tensor(axes)] * inv_freq.double()  # [B, N, R / 2]
        angle = angle[:, None]
    else:
        angle = positions[..., None] * inv_freq.double()
        angle = angle[:, None] if positions.dim() == 2 else angle
    half = inv_freq.numel()
    a, b, rest = x[..., :half].double(), x[..., half : 2 * half].double(), x[..., 2 * half :].double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


INV_FREQ = 10000.0 ** (-torch.arange(0, 16, 2) / 16)


@pytest.mark.parametrize("columns", [16, 21])  # all columns, or the first 16 only
def test_keys_are_turned_to_their_new_positions(backend, columns):
    torch.manual_seed(0)
    raw, value = torch.randn(2, 3, 40, columns, dtype=torch.float64), torch.randn(2, 3, 40, 8)
    keep = torch.randperm(40)[:11].sort().values
    old = torch.stack([torch.arange(40) + 3, torch.arange(40) * 2])
    new = torch.stack([torch.arange(11) + 100, torch.arange(11) * 5])
    for positions, targets in [(None, None), (old[0], None), (old, None), (old, new), (None, new[0])]:
        key = rotated(raw, torch.arange(40) if positions is None else positions, INV_FREQ)
        rope = ck.Rope(INV_FREQ, positions, targets)
        keys, values = ck.repack_kv(([key.float()], [value]), keep, rope=rope)
        wanted = rotated(raw[:, :, keep], torch.arange(11) if targets is None else targets, INV_FREQ)
        torch.testing.assert_close(keys[0].double(), wanted, atol=3e-6, rtol=0)
        assert same(values[0], value[:, :, keep])
        assert same(keys[0][..., 16:], key.float()[:, :, keep, 16:])
        inplace = ck.repack_kv(([key.float()], [value.clone()]), keep, rope=rope, inplace=True)
        assert same(inplace[0][0], keys[0])


def test_per_head_and_ragged_keys_are_turned(backend):
    torch.manual_seed(0)
    raw, value = torch.randn(2, 3, 20, 16, dtype=torch.float64), torch.randn(2, 3, 20, 8)
    old = torch.stack([torch.arange(20) + 3, torch.arange(20) * 2])
    key = rotated(raw, old, INV_FREQ).float()
    lists = [[torch.randperm(20)[:6].sort().values for _ in range(3)] for _ in range(2)]
    keep = torch.stack([torch.stack(row) for row in lists])
    rope = ck.Rope(INV_FREQ, old)
    (dense,), _ = ck.repack_kv((key, value), keep, rope=rope)
    wanted = rotated(raw.gather(2, keep[..., None].expand(-1, -1, -1, 16)), torch.arange(6), INV_FREQ)
    torch.testing.assert_close(dense.double(), wanted, atol=3e-6, rtol=0)
    packed = ck.repack_kv((key, value), lists, rope=rope)
    assert same(packed.keys[0], dense.flatten(0, 2))
    shifted = ck.repack_kv((key, value), lists, rope=ck.Rope(INV_FREQ, old, torch.arange(36) % 6))
    assert same(shifted.keys[0], packed.keys[0])


def test_three_position_axes(backend):
    torch.manual_seed(0)
    axes = [0, 0, 1, 1, 1, 2, 2, 2]
    raw, value = torch.randn(2, 3, 20, 16, dtype=torch.float64), torch.randn(2, 3, 20, 8)
    old, new = torch.randint(0, 50, (3, 2, 20)), torch.randint(0, 50, (3, 2, 5))
    keep = torch.tensor([0, 4, 9, 10, 19])
    key = rotated(raw, old, INV_FREQ, axes).float()
    (result,), _ = ck.repack_kv((key, value), keep, rope=ck.Rope(INV_FREQ, old, new, axes))
    torch.testing.assert_close(result.double(), rotated(raw[:, :, keep], new, INV_FREQ, axes), atol=3e-6, rtol=0)


@needs_engine
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_rotation_has_the_same_bits_everywhere(isa):
    code = """
import torch
import cacovid_kernels as ck
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for columns, half in ((2, 1), (16, 8), (37, 15), (128, 64), (128, 32)):
        torch.manual_seed(columns)
        key, value = (torch.randn(2, 3, 50, columns) * 3).to(dtype), torch.zeros(2, 3, 50, 4)
        keep = torch.randperm(50)[:20].sort().values
        rope = ck.Rope(10000.0 ** (-torch.arange(half) / half), torch.arange(50) * 7)
        spread = key.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        for x in (key, key.transpose(1, 2).contiguous().transpose(1, 2), spread):
            ours = ck.repack_kv((x, value), keep, rope=rope)[0][0]
            with ck.use_backend("reference"):
                wanted = ck.repack_kv((x, value), keep, rope=rope)[0][0]
            assert torch.equal(ours, wanted)
            assert torch.equal(ck.repack_kv((x.clone(), value.clone()), keep, rope=rope, inplace=True)[0][0], wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CACOVID_CPU_ISA": isa})


# ---- refusals, opcheck, torch.compile ------------------------------------------------------------


def test_errors(cache):
    keep = torch.tensor([1, 4])
    key, value = cache[0][0], cache[1][0]
    expanded = torch.randn(1, 3, 12, 8).expand(2, 3, 12, 8)
    rope = ck.Rope(INV_FREQ[:4])

    def call(*args, **options):
        return lambda: ck.repack_kv(*args, **options)

    for error, message, attempt in [
        (ValueError, r"keep must ascend without duplicates, it holds 4 before 1 \(keep: \[1, 1, 2\] int64 cpu\)",
         call(cache, torch.tensor([4, 1]))),
        (ValueError, r"it holds 4 before 4", call(cache, torch.tensor([4, 4]))),
        (ValueError, r"it holds -1 before 3", call(cache, torch.tensor([[1, -1, 3]] * 2))),
        (ValueError, r"it holds 5 before 2", call(cache, [[torch.tensor([1]), torch.tensor([5, 2]), keep]] * 2)),
        (ValueError, r"it holds 4 before 1", call(cache, [keep, keep.flip(0)])),
        (IndexError, r"keep holds 12, positions must be in \[0, 12\)", call(cache, torch.tensor([1, 12]))),
        (IndexError, r"keep holds -2", call(cache, torch.tensor([-2, 1]))),
        (IndexError, r"keep holds -1", call(cache, [[torch.tensor([-1])] * 3] * 2)),
        (ValueError, r"keep is empty", call(cache, keep[:0])),
        (TypeError, r"keep must be int64 or int32 .*\[12\] bool", call(cache, torch.ones(12, dtype=torch.bool))),
        (TypeError, r"keep is a int, it must be a Selection", call(cache, 3)),
        (ValueError, r"keep has 3 entries for 2 layers", call(cache, [keep] * 3)),
        (ValueError, r"keep must be \[K\], \[B, K\] or \[B, H, K\] for a cache with B=2",
         call(cache, keep.expand(3, 2))),
        (ValueError, r"must be \[K\]", call(cache, keep.expand(2, 2, 2))),
        (ValueError, r"nested keep lists must hold one tensor per head", call(cache, [[keep] * 2] * 2)),
        (ValueError, r"cu_seqlens \[7\] int32", call(cache, ck.RaggedKeep(keep, torch.tensor([0, 2])))),
        (ValueError, r"some layers have a ragged keep",
         call(cache, [keep, ck.RaggedKeep.from_lists([[keep] * 3] * 2)])),
        (ValueError, r"the same batch and heads in every layer",
         call(([key, key[:, :2]], [value, value[:, :2]]), [[[keep] * 3] * 2, [[keep] * 2] * 2])),
        (ValueError, r"the selection covers 6 tokens, the cache has 2 rows of 12",
         call(cache, ck.select_tokens(torch.randn(6), grid_thw=[(1, 2, 3)], num_tokens=2))),
        (TypeError, r"cache is a list, it must be \(keys, values\)", call([key], keep)),
        (TypeError, r"cache is a Tensor", call(key, keep)),
        (ValueError, r"cache has 2 keys and 1 values", call((cache[0], cache[1][:1]), keep)),
        (ValueError, r"values of layer 0 must be \[B, H, N, D\]", call((key, value[:, :, :5]), keep)),
        (ValueError, r"keys of layer 0 must be \[B, H, N, D\]", call((key[0], value[0]), keep)),
        (TypeError, r"keys of layer 0 must be a strided tensor, .*got str", call((["key"], [value]), keep)),
        (TypeError, r"neither complex", call((key * 1j, value), keep)),
        (ValueError, r"release=True shrinks", call(cache, keep, release=True)),
        (ValueError, r"memory of its own", call((expanded, expanded.clone()), keep, inplace=True)),
        (ValueError, r"two of the tensors share memory", call((key, key), keep, inplace=True)),
        (ValueError, r"a ragged keep in place needs contiguous",
         call([memory_order(x, (0, 2, 1, 3)) for x in (key, value)], [[torch.tensor([0])] * 3] * 2, inplace=True)),
        (ValueError, r"in place a head holds at most N=12 rows, keep has 13",
         call(cache, torch.tensor([*range(12), -1]), inplace=True)),
        (RuntimeError, r"has no gradient, but keys of layer 0", call((key.clone().requires_grad_(), value), keep)),
        (TypeError, r"rope needs floating keys", call((key.int(), value), keep, rope=rope)),
        (TypeError, r"rope is a int, it must be a Rope\. Pass Rope\(inv_freq\)", call(cache, keep, rope=3)),
        (ValueError, r"inv_freq must be \[R / 2\] with R at most the head size 4",
         call(cache[::-1], keep, rope=ck.Rope(INV_FREQ))),
        (ValueError, r"rope.positions must be \[12\]",
         call(cache, keep, rope=ck.Rope(INV_FREQ[:4], torch.arange(5)))),
        (ValueError, r"new_positions must hold one position per row kept, 2 per head",
         call(cache, keep, rope=ck.Rope(INV_FREQ[:4], None, torch.arange(5)))),
        (ValueError, r"rope.axes must name one of the 3 position axes for each of the 4",
         call(cache, keep, rope=ck.Rope(INV_FREQ[:4], torch.zeros(3, 2, 12)))),
    ]:  # fmt: skip
        with pytest.raises(error, match=message) as caught:
            attempt()
        assert str(caught.value).startswith("repack_kv: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_read_on_the_host(inplace):
    """On meta tensors every host read is an error, inside an op too, where no dispatch mode looks."""
    with ck.use_backend("reference"):
        kept = ck.select_tokens(torch.zeros(2, 12, device="meta"), keep_ratio=0.4)
        ragged = ck.RaggedKeep.from_mask(torch.zeros(2, 3, 24, dtype=torch.bool, device="meta"), 20)
        cache = [torch.zeros(2, 3, 24, 16, device="meta") for _ in range(2)]
        rope = ck.Rope(INV_FREQ, torch.arange(24))
        (keys,), _ = ck.repack_kv(cache, kept, rope=rope, inplace=inplace)
        assert keys.shape == (2, 3, 9, 16)
        packed = ck.repack_kv(cache, ragged, rope=rope, inplace=inplace)
        assert packed.keys[0].shape == (20, 16)


def low_level_samples():
    torch.manual_seed(0)
    keys, values = [torch.randn(2, 3, 9, 8) for _ in range(2)], [torch.randn(2, 3, 9, 4) for _ in range(2)]
    keep = [torch.tensor([[[0, 4, 8]]]), KEEP["per row and head"]]
    tables = [torch.randn(1, 1, 3, 4), torch.randn(2, 3, 5, 4)]
    turned = [True, True, False, False]
    dense = (keys + values, keep, [], [0, 1, 0, 1], tables, tables, turned)
    ragged = ck.RaggedKeep.from_mask(torch.rand(2, 3, 9) < 0.5, 20)
    flat = (keys + values, [ragged.indices], [ragged.cu_seqlens], [0] * 4, [], [], [False] * 4)
    yield repack._repack_rows, dense
    yield repack._repack_rows, flat
    yield repack._repack_rows_, ([x.clone() for x in keys + values], *dense[1:], [1, 2, 1, 2], False)
    yield repack._repack_rows_, ([x.clone() for x in keys + values], *flat[1:], [2] * 4, False)


@pytest.mark.parametrize("sample", list(low_level_samples()), ids=lambda s: s[0].name)
def test_opcheck(sample):
    op, args = sample
    torch.library.opcheck(op.dispatch, args)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace):
    def step(keys, values, keep, inv_freq):
        kept = ck.repack_kv((keys, values), keep, inplace=inplace, rope=ck.Rope(inv_freq))
        return [x + 1 for x in kept[0]], [x * 2 for x in kept[1]]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in [(12, 4), (30, 7), (31, 9)]:
        torch.manual_seed(n)
        keys, values = [torch.randn(2, 3, n, 8) for _ in range(2)], [torch.randn(2, 3, n, 8) for _ in range(2)]
        keep = torch.randperm(n)[:k].sort().values
        wanted = step([x.clone() for x in keys], [x.clone() for x in values], keep, INV_FREQ[:4])
        assert equal(compiled(keys, values, keep, INV_FREQ[:4]), wanted)
