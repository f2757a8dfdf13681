"""What a head keeps, in every form a caller may say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.kv import RaggedKeep
from cacovid_kernels.ops._checks import describe
from cacovid_kernels.selection import Selection

Keep = Tensor | RaggedKeep  # a tensor is [b, h, K] int64 with b in {1, B} and h in {1, H}
_FORMS = "a Selection, an index tensor [K], [B, K] or [B, H, K], a RaggedKeep, or a list per layer of these"


def _depth(keep: Any) -> int:
    return 1 + _depth(keep[0]) if isinstance(keep, (list, tuple)) and keep else 0


def rows_of_selection(op: str, keep: Selection, b: int, n: int) -> Tensor:
    """[1, K] positions that all rows share, or [B, longest] positions of every row, padded with -1 at the end."""
    if keep.num_tokens == n:
        return keep.indices[None]
    per_row, left = divmod(len(keep.lengths), max(b, 1))
    tokens = [t * h * w for t, h, w in keep.grid_thw]
    if left or any(sum(tokens[i * per_row : (i + 1) * per_row]) != n for i in range(b)):
        raise ValueError(
            f"{op}: the selection covers {keep.num_tokens} tokens, the cache has {b} rows of {n}. "
            f"Extend it over the prompt with selection.within(token_mask)."
        )
    lengths = [sum(keep.lengths[i * per_row : (i + 1) * per_row]) for i in range(b)]
    longest = max(lengths) if lengths else 0
    rows = [
        torch.nn.functional.pad(kept - i * n, (0, longest - lengths[i]), value=-1)
        for i, kept in enumerate(keep.indices.split(lengths))
    ]
    return torch.stack(rows)


def _one(op: str, keep: Any, b: int, h: int, n: int) -> Keep:
    if isinstance(keep, (list, tuple)):
        heads = [len(row) if isinstance(row, (list, tuple)) else -1 for row in keep]
        if heads != [h] * b or not all(isinstance(k, Tensor) for row in keep for k in row):
            raise ValueError(f"{op}: nested keep lists must hold one tensor per head, keep[b][h] for B={b} and H={h}.")
        keep = RaggedKeep.from_lists(keep)
    if isinstance(keep, RaggedKeep):
        if keep.cu_seqlens.shape != (b * h + 1,) or keep.cu_seqlens.dtype != torch.int32 or keep.indices.dim() != 1:
            raise ValueError(
                f"{op}: a RaggedKeep must hold indices [total] and cu_seqlens [{b * h + 1}] int32 for B={b} and H={h} "
                f"(cu_seqlens: {describe(keep.cu_seqlens)}). Build it with RaggedKeep.from_lists or from_mask."
            )
        return keep
    if isinstance(keep, Selection):
        keep = rows_of_selection(op, keep, b, n)
    if not isinstance(keep, Tensor):
        raise TypeError(f"{op}: keep is a {type(keep).__name__}, it must be {_FORMS}.")
    if keep.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: keep must be int64 or int32 (keep: {describe(keep)}). Pass positions, not a mask.")
    leading = keep.shape[:-1]  # of [B, H]
    if keep.dim() not in (1, 2, 3) or any(s != 1 and s != (b, h)[axis] for axis, s in enumerate(leading)):
        raise ValueError(
            f"{op}: keep must be [K], [B, K] or [B, H, K] for a cache with B={b} and H={h} (keep: {describe(keep)})."
        )
    keep = keep.detach().to(torch.int64)
    return keep[None, None] if keep.dim() == 1 else keep[:, None] if keep.dim() == 2 else keep


def _check_values(op: str, keep: Keep, n: int) -> None:
    """Positions in [0, N), strictly rising within a head, -1 only behind them: what moving in place rests on."""
    index = keep.indices if isinstance(keep, RaggedKeep) else keep
    padding = torch.zeros_like(index, dtype=torch.bool) if isinstance(keep, RaggedKeep) else index == -1
    outside = ((index < 0) & ~padding) | (index >= n)
    if outside.any():
        raise IndexError(
            f"{op}: keep holds {index[outside][0].item()}, positions must be in [0, {n}) (keep: {describe(index)}). "
            f"A padded keep may end in -1."
        )
    before, after = index[..., :-1], index[..., 1:]
    falling = (after <= before) & ~padding[..., 1:] | padding[..., :-1] & ~padding[..., 1:]
    if isinstance(keep, RaggedKeep) and index.numel() > 1:
        starts = keep.cu_seqlens[1:-1].long() - 1  # the step from one head to the next may fall
        falling[starts[(starts >= 0) & (starts < index.numel() - 1)]] = False
    if falling.any():
        at = falling.nonzero()[0].tolist()
        pair = (before[tuple(at)].item(), after[tuple(at)].item())
        raise ValueError(
            f"{op}: keep must ascend without duplicates, it holds {pair[0]} before {pair[1]} "
            f"(keep: {describe(index)}). Sort it: the order of a cache is the order of time."
        )


def keeps_of(
    op: str, keep: Any, shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> tuple[list[Keep], list[int]]:
    """The distinct keep lists of a cache and which of them each layer uses; `shapes` are (B, H, N) per layer."""
    depth = _depth(keep)
    per_layer = depth in (1, 3)
    if depth > 3 or (per_layer and len(keep) != len(shapes)):
        raise ValueError(f"{op}: keep has {len(keep)} entries for {len(shapes)} layers. Pass {_FORMS}.")
    known: list[tuple[Any, tuple[int, int, int]]] = []  # no dict: the sizes of a compiled caller have no hash
    keeps: list[Keep] = []
    layer_keeps: list[int] = []
    for layer, shape in enumerate(shapes):
        given = keep[layer] if per_layer else keep
        at = next((i for i, (other, size) in enumerate(known) if other is given and size == shape), len(known))
        if at == len(known):
            known.append((given, shape))
            keeps.append(_one(op, given, *shape))
            if (keeps[-1].indices if isinstance(keeps[-1], RaggedKeep) else keeps[-1]).device != device:
                raise ValueError(f"{op}: the cache is on {device} but keep is not. Move keep to {device}.")
        layer_keeps.append(at)
    ragged = [isinstance(k, RaggedKeep) for k in keeps]
    if any(ragged) and not all(ragged):
        raise ValueError(f"{op}: some layers have a ragged keep and some not. Make all of them a RaggedKeep.")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = [shapes[layer_keeps.index(i)][2] for i in range(len(keeps))]
        same = {(getattr(k, "shape", None), n) for k, n in zip(keeps, lengths, strict=True)}
        if len(same) == 1 and not any(ragged) and len(keeps) > 1:  # one check for all layers
            _check_values(op, torch.stack([k for k in keeps if isinstance(k, Tensor)]), lengths[0])
        else:
            for k, n in zip(keeps, lengths, strict=True):
                _check_values(op, k, n)
    return keeps, layer_keeps
