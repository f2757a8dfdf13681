"""Tables that turn keys from their old positions to their new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.kv import RaggedKeep, Rope
from cacovid_kernels.ops._checks import describe
from cacovid_kernels.ops._keep import Keep


def _with_axes(op: str, name: str, x: Tensor, shapes: str, dims: int) -> Tensor:
    """`x` with all `dims` leading axes it may leave out."""
    if x.dim() > dims or x.dim() < 1:
        raise ValueError(f"{op}: rope.{name} must be {shapes} ({name}: {describe(x)}).")
    return x.reshape((1,) * (dims - x.dim()) + tuple(x.shape))


def _differences(op: str, rope: Rope, keep: Keep, shape: tuple[int, int, int]) -> Tensor:
    """New minus old position of every row kept: [A, b, h, K], for a ragged keep [A, total]."""
    b, h, n = shape
    ragged = isinstance(keep, RaggedKeep)
    index = keep.indices if isinstance(keep, RaggedKeep) else keep
    old = torch.arange(n, device=index.device) if rope.positions is None else rope.positions.to(index.device)
    old = _with_axes(op, "positions", old, "[N], [B, N] or [A, B, N]", 3)  # [A, b, N]
    if old.shape[2] != n or old.shape[1] not in (1, b):
        raise ValueError(
            f"{op}: rope.positions must be [{n}], [{b}, {n}] or [A, {b}, {n}] (positions: {list(old.shape)})."
        )
    if isinstance(keep, RaggedKeep):
        entries = torch.arange(index.numel(), device=index.device)
        head = torch.searchsorted(keep.cu_seqlens[1:].long(), entries, right=True).clamp(max=b * h - 1)
        new = (entries - keep.cu_seqlens[head])[None]  # [1, total]
        rows = old.expand(-1, b, -1)
        old = rows[:, head // h, index.clamp(0, n - 1)]  # [A, total]
    else:
        full = (old.shape[0], max(old.shape[1], index.shape[0]), index.shape[1])
        old = old[:, :, None].expand(*full, n).gather(-1, index.clamp(0, n - 1).expand(*full, -1))  # [A, b, h, K]
        new = torch.arange(index.shape[2], device=index.device)[None, None, None]  # [1, 1, 1, K]
    if rope.new_positions is not None:
        new = rope.new_positions.to(index.device)
        if ragged:
            new = _with_axes(op, "new_positions", new, "[total] or [A, total]", 2)
        else:
            new = _with_axes(op, "new_positions", new, "[K], [B, K] or [A, B, K]", 3)[:, :, None]
        if new.shape[-1] != old.shape[-1] or any(
            s not in (1, t) and t != 1 for s, t in zip(new.shape, old.shape, strict=True)
        ):
            raise ValueError(
                f"{op}: rope.new_positions must hold one position per row kept, {old.shape[-1]} per head "
                f"(new_positions: {describe(rope.new_positions)})."
            )
    return new.double() - old.double()


def tables(
    op: str, rope: Rope | None, keeps: list[Keep], shapes: list[tuple[int, int, int]], columns: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Float32 cosines and sines for every keep, [b, h, K, R / 2] or [total, R / 2], computed in float64."""
    if rope is None:
        return [], []
    if not isinstance(rope, Rope):
        raise TypeError(f"{op}: rope is a {type(rope).__name__}, it must be a Rope. Pass Rope(inv_freq).")
    frequencies = rope.inv_freq
    if frequencies.dim() != 1 or 2 * frequencies.numel() > columns or frequencies.is_complex():
        raise ValueError(
            f"{op}: rope.inv_freq must be [R / 2] with R at most the head size {columns} "
            f"(inv_freq: {describe(frequencies)})."
        )
    cos, sin = [], []
    for keep, shape in zip(keeps, shapes, strict=True):
        moved = _differences(op, rope, keep, shape)
        if moved.shape[0] == 1:
            moved = moved[0, ..., None]
        elif rope.axes is None or len(rope.axes) != frequencies.numel() or max(rope.axes) >= moved.shape[0]:
            raise ValueError(
                f"{op}: rope.axes must name one of the {moved.shape[0]} position axes for each of the "
                f"{frequencies.numel()} frequencies."
            )
        else:
            moved = torch.stack([moved[axis] for axis in rope.axes], -1)
        angle = moved * frequencies.to(moved.device).double()
        cos.append(angle.cos().float().contiguous())
        sin.append(angle.sin().float().contiguous())
    return cos, sin
