"""Random calls of the low-level op of repack_paged_kv, and what they must do, one Python step per row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

OUT_OF_BOUNDS = 8
SIZED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ANY = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ODD_IDS = [-1, -7, 2**31 - 1, -(2**31)]
ODD_POSITIONS = [2**31, 2**62, 2**32 + 1]


@dataclass
class Call:
    """Arguments of the op; `bases` are the memory that `pages` are views of."""

    bases: list[Tensor]
    pages: list[Tensor]
    block_table: Tensor
    seq_lens: Tensor
    keep: list[Tensor]
    keep_of: list[int]
    cos: list[Tensor]
    sin: list[Tensor]
    rotated: list[bool]
    out_block_table: Tensor | None

    def args(self) -> tuple:
        return (
            self.pages, self.block_table, self.seq_lens, self.keep, self.keep_of, self.cos, self.sin, self.rotated,
            self.out_block_table,
        )  # fmt: skip

    def copy(self) -> Call:
        """The same call on memory of its own."""
        bases = [base.clone() for base in self.bases]
        pages = [
            base.as_strided(x.shape, x.stride(), x.storage_offset()) for base, x in zip(bases, self.pages, strict=True)
        ]
        return replace(self, bases=bases, pages=pages)


def bits(x: Tensor) -> Tensor:
    return x.view(SIZED[x.element_size()])


def random_bits(shape: list[int], dtype: torch.dtype) -> Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


def laid_out(rng: Random, shape: list[int], dtype: torch.dtype, floats: bool) -> tuple[Tensor, Tensor]:
    """Memory full of garbage and pages `[blocks, block_size, H, D]` in it, in one of the layouts that engines use."""
    blocks, size, heads, columns = shape
    kind = rng.choice(["NHD", "HND", "pages, 2", "2, pages", "wide", "spread", "any"])
    full, index, order = shape, (), (0, 1, 2, 3)
    if kind == "HND":
        full, order = [blocks, heads, size, columns], (0, 2, 1, 3)
    elif kind == "pages, 2":
        full, index = [blocks, 2, size, heads, columns], (slice(None), 1)
    elif kind == "2, pages":
        full, index = [2, *shape], (1,)
    elif kind == "wide":
        full, index = [n + 2 for n in shape], (slice(1, -1),) * 4
    elif kind == "spread":
        full, order = [columns, *shape[:3]], (1, 2, 3, 0)
    elif kind == "any":
        permutation = rng.sample(range(4), 4)
        full, order = [shape[d] for d in permutation], tuple(permutation.index(d) for d in range(4))
    base = (torch.randn(full) * 3).to(dtype) if floats else random_bits(full, dtype)
    view = (base[index] if index else base).permute(order)
    assert list(view.shape) == shape
    return base, view


def ascending(rng: Random, n: int, kept: int, columns: int) -> list[int]:
    return [*sorted(rng.sample(range(n), kept)), *[-1] * (columns - kept)]


def random_call(rng: Random, hostile: bool, in_place: bool, most: int = 4, values: Random | None = None) -> Call:
    """Shapes, dtypes and layouts come from `rng`, what tensors hold from `values` (default: both from one).

    `hostile`: ids and positions out of range, but ascending positions in place, so that there is one answer.
    """
    values = values or rng
    torch.manual_seed(values.randrange(2**40))
    b, m, size, heads = rng.randint(1, 3), rng.randint(1, most), rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 3)
    kept = rng.randint(1, m * size)
    m2 = -(-kept // size) + rng.randint(0, 1)
    blocks = b * (m + m2) + rng.randint(0, 2)
    half, count = rng.choice([0, 0, 1, 3, 8]), rng.randint(1, 3)
    lists = rng.randint(1, min(count, 2))  # all of them are in use: the status speaks of those

    ids = torch.tensor(values.sample(range(blocks), b * (m + m2)), dtype=torch.int32)
    table, out_table = ids[: b * m].view(b, m).contiguous(), ids[b * m :].view(b, m2).contiguous()
    lens = [values.randint(0, m * size) for _ in range(b)]
    counts = [values.randint(0, min(n, kept)) for n in lens]
    shortest = min(range(b), key=lambda i: lens[i])
    keep, cos, sin = [], [], []
    for _ in range(lists):
        h, sequences = rng.choice([1, heads]), [shortest] if rng.random() < 0.3 else range(b)
        rows = [[ascending(values, lens[i], counts[i], kept) for _ in range(h)] for i in sequences]
        for row in (row for sequence in rows for row in sequence):
            if not hostile or values.random() < 0.5:
                continue
            if not in_place:
                row[values.randrange(kept)] = values.choice([*ODD_POSITIONS, -5, -(2**63), 0])
            elif row[-1] == -1:
                row[-1] = values.choice(ODD_POSITIONS)
        keep.append(torch.tensor(rows))
        angles = torch.randn(rng.choice([1, b]), rng.choice([1, heads]), kept, half) * 3
        angles[:, :, : values.randint(0, kept)] = 0  # a prefix that is not turned
        cos.append(angles.cos())
        sin.append(angles.sin() if values.random() < 0.8 else torch.zeros_like(angles))
    if hostile:
        lens = [values.choice([n, n, n + 3 * size, -3, 2**31 - 1]) for n in lens]
        for some in (table, out_table):
            for at in range(some.numel()):
                if values.random() < 0.15:
                    some.view(-1)[at] = values.choice([*ODD_IDS, blocks])
    bases, pages, rotated = [], [], []
    for _ in range(count):
        turn = half > 0 and rng.random() < 0.6
        columns = rng.choice([1, 2, 5, 8, 16, 33]) + (2 * half if turn else 0)
        base, view = laid_out(rng, [blocks, size, heads, columns], rng.choice(FLOATS if turn else ANY), turn)
        bases.append(base)
        pages.append(view)
        rotated.append(turn)
    keep_of, angles = [i % lists for i in range(count)], (cos, sin) if half else ([], [])
    return Call(
        bases, pages, table, torch.tensor(lens, dtype=torch.int32), keep, keep_of, *angles, rotated,
        None if in_place else out_table,
    )  # fmt: skip


def turned_row(row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every product and sum rounded to float32 (float64 for float64), and once more to the row's dtype."""
    half = cos.numel()
    wide = row.double() if row.dtype == torch.float64 else row.float()
    a, b = wide[:half], wide[half : 2 * half]
    return torch.cat([(a * cos - b * sin).to(row.dtype), (b * cos + a * sin).to(row.dtype), row[2 * half :]])


def oracle(call: Call) -> tuple[Tensor, ...]:
    """Does to the pages of `call` what the op must do, and returns what it must return."""
    blocks, size, heads, _ = call.pages[0].shape
    b, width = call.block_table.shape
    kept = call.keep[0].shape[2]
    table, lens = call.block_table.tolist(), call.seq_lens.tolist()
    targets = table if call.out_block_table is None else call.out_block_table.tolist()
    status = [0] * b

    def place(ids: list[int], row: int) -> tuple[int, int] | None:
        block = ids[row // size] if row // size < len(ids) else -1
        return (block, row % size) if 0 <= block < blocks else None

    for x, j, turn in zip(call.pages, call.keep_of, call.rotated, strict=True):
        before = x.clone()
        keep = call.keep[j].expand(b, heads, kept).tolist()
        for s in range(b):
            for h in range(heads):
                for i, position in enumerate(keep[s][h]):
                    if position == -1:
                        continue
                    source = place(table[s], position) if 0 <= position < lens[s] else None
                    target = place(targets[s], i)
                    if source is None or target is None:
                        status[s] = OUT_OF_BOUNDS
                    if target is None:
                        continue
                    row = torch.zeros(x.shape[3], dtype=x.dtype) if source is None else before[(*source, h)].clone()
                    if turn and source is not None:
                        cos, sin = (a[j].expand(b, heads, -1, -1)[s, h, i] for a in (call.cos, call.sin))
                        stays = call.out_block_table is None and position == i
                        if not stays or bool((cos != 1).any() or (sin != 0).any()):
                            row = turned_row(row, cos, sin)
                    bits(x)[(*target, h)] = bits(row)
    lengths = [sum(p != -1 for p in call.keep[0].expand(b, -1, -1)[s, 0].tolist()) for s in range(b)]
    columns = -(-kept // size)
    new_table, freed, num_freed = [], [], []
    for s in range(b):
        used, used_before = -(-lengths[s] // size), min(-(-max(lens[s], 0) // size), width)
        new_table.append([*targets[s][:used], *[-1] * (columns - used)])
        gone = table[s][:used_before] if call.out_block_table is not None else table[s][used:used_before]
        freed.append([*gone, *[-1] * (width - len(gone))])
        num_freed.append(len(gone))
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (new_table, lengths, freed, num_freed, status))


def assert_same(found: Call, returned: tuple[Tensor, ...], wanted: Call, expected: tuple[Tensor, ...]) -> None:
    """The same results, and the same bits in all memory (any NaN for another)."""
    for x, y in zip(returned, expected, strict=True):
        assert x.dtype == torch.int32
        assert torch.equal(x, y), (x, y)
    for x, y, turn in zip(found.bases, wanted.bases, found.rotated, strict=True):
        same = bits(x.contiguous()) == bits(y.contiguous())
        if turn:
            same |= x.isnan() & y.isnan()
        assert same.all()
