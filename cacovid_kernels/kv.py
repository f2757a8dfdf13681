"""What compaction of caches takes and returns besides tensors: keep lists, packed and paged caches, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacovid_kernels._masks import masked_positions


@dataclass(frozen=True)
class RaggedKeep:
    """Kept positions of every head, where heads keep different numbers of tokens.

    Attributes:
        indices: `[total]` int64, positions in [0, N), head after head in (batch, head) order, ascending within
            a head.
        cu_seqlens: `[B * H + 1]` int32: head `s = b * H + h` keeps `indices[cu_seqlens[s] : cu_seqlens[s + 1]]`.
    """

    indices: Tensor
    cu_seqlens: Tensor

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Tensor]]) -> RaggedKeep:
        """From one tensor of positions per head, `lists[b][h]`."""
        heads = [keep for row in lists for keep in row]
        bounds = torch.tensor([0, *(keep.numel() for keep in heads)]).cumsum(0)
        indices = torch.cat([keep.reshape(-1) for keep in heads]).to(torch.int64)
        return cls(indices, bounds.to(torch.int32).to(indices.device))

    @classmethod
    def from_mask(cls, mask: Tensor, total: int) -> RaggedKeep:
        """From a bool mask `[B, H, N]` with `total` true entries, a number that the host knows. No synchronisation."""
        b, h, n = mask.shape
        flat = masked_positions(mask.reshape(-1), total)
        starts = torch.arange(b * h + 1, device=mask.device) * n
        return cls(flat % n, torch.searchsorted(flat, starts).to(torch.int32))


@dataclass(frozen=True)
class PackedKV:
    """A cache whose heads hold different numbers of tokens, without padding: variable-length attention's layout.

    Attributes:
        keys: per layer `[total, D]`: the rows of head (0, 0), then of (0, 1), ... then of (1, 0), ...
        values: per layer `[total, D]`, in the same order.
        cu_seqlens: per layer `[B * H + 1]` int32: head `s = b * H + h` holds the rows
            `cu_seqlens[s] : cu_seqlens[s + 1]`. With each head as a sequence of its own this is what
            variable-length attention kernels call `cu_seqlens_k`.
        batch: B.
        heads: H, key and value heads.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cu_seqlens: tuple[Tensor, ...]
    batch: int
    heads: int

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def head(self, layer: int, b: int, h: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, D]` of one head. Reads two bounds on the host: one synchronisation on a GPU."""
        s = b * self.heads + h
        first, last = self.cu_seqlens[layer][s : s + 2].tolist()
        return self.keys[layer][first:last], self.values[layer][first:last]


@dataclass(frozen=True)
class PagedKV:
    """A paged cache after some rows of its sequences were dropped. Everything but keys and values is int32.

    Attributes:
        keys: the key pages that were passed, one tensor per layer.
        values: the value pages that were passed.
        block_table: `[B, ceil(K / block_size)]`: the blocks of every sequence, -1 behind those in use.
        seq_lens: `[B]` rows in use now.
        freed_blocks: `[B, M]`: ids of the blocks that a sequence used and does not use any more, as its table had
            them, then -1. Where sequences share a block it may be freed by one and in use by another: count
            references.
        num_freed: `[B]`: how many of them there are.
        status: `[B]` bits of `Status`: `OUT_OF_BOUNDS` where a position or a block id was out of range.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_table: Tensor
    seq_lens: Tensor
    freed_blocks: Tensor
    num_freed: Tensor
    status: Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a cache, for keys that move to new positions.

    The convention is `rotate_half`: column j and column j + R / 2 are a pair, rotated by position * inv_freq[j].
    A key is rotated on by the difference of its positions, so its scale (attention scaling, YaRN) stays.

    Attributes:
        inv_freq: `[R / 2]` inverse frequencies; columns from R on carry no position.
        positions: positions the keys were rotated for: `[N]`, `[B, N]`, or `[A, B, N]` with one row per axis
            (M-RoPE: time, height, width). Default: 0 .. N - 1.
        new_positions: positions the kept keys shall have: `[K]`, `[B, K]` or `[A, B, K]`, for a ragged keep
            `[total]` or `[A, total]`. Default: 0, 1, 2, ... within each head.
        axes: for A > 1 the axis of every frequency, R / 2 entries: Qwen2-VL with sections 16, 24, 24 has
            `[0] * 16 + [1] * 24 + [2] * 24`.
    """

    inv_freq: Tensor
    positions: Tensor | None = None
    new_positions: Tensor | None = None
    axes: Sequence[int] | None = None
