"""Compaction of key and value caches: all layers in one call, into new memory or in place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels._library import Op
from cacovid_kernels.kv import PackedKV, RaggedKeep, Rope
from cacovid_kernels.ops._cache import Cache, read_cache
from cacovid_kernels.ops._checks import describe
from cacovid_kernels.ops._keep import keeps_of
from cacovid_kernels.ops._overlap import byte_range, has_broadcast_axis, mark_written, overlaps
from cacovid_kernels.ops._rope import tables
from cacovid_kernels.reference.repack import IN_FRONT, IN_HEADS

_OP = "repack_kv"
ROTATABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LISTS = "Tensor[] keep, Tensor[] cu_seqlens, int[] keep_of, Tensor[] cos, Tensor[] sin, bool[] rotated"


def _fake_repack(xs, keep, cu_seqlens, keep_of, cos, sin, rotated):
    outs = []
    for x, j in zip(xs, keep_of, strict=True):
        shape = (keep[j].shape[0],) if cu_seqlens else (x.shape[0], x.shape[1], keep[j].shape[2])
        outs.append(x.new_empty((*shape, x.shape[3])))
    return outs


_repack_rows = Op("repack", f"repack_rows(Tensor[] xs, {_LISTS}) -> Tensor[]", _fake_repack)
_repack_rows_ = Op(
    "repack",
    f"repack_rows_(Tensor(a!)[] xs, {_LISTS}, int[] placements, bool zero_tail) -> ()",
    lambda *args: None,
)


def _check_in_place(xs: list[Tensor], placements: list[int]) -> None:
    for x, placement in zip(xs, placements, strict=True):
        if has_broadcast_axis(x):
            raise ValueError(f"{_OP}: inplace=True needs every element in memory of its own (cache: {describe(x)}).")
        if placement == IN_FRONT and not x.is_contiguous():
            raise ValueError(
                f"{_OP}: a ragged keep in place needs contiguous tensors (cache: {describe(x)}, strides "
                f"{list(x.stride())}). Call .contiguous(), or pass inplace=False."
            )
    ranges = sorted(byte_range(x) for x in xs)
    if any(overlaps(a, b) for a, b in pairwise(ranges)):
        raise ValueError(
            f"{_OP}: inplace=True, but two of the tensors share memory, which would be moved twice. "
            f"Pass each tensor once, or inplace=False."
        )


def _check_release(xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        storage = x.untyped_storage()
        whole = x.is_contiguous() and storage.nbytes() == x.numel() * x.element_size()
        holders = torch._C._storage_Use_Count(storage._cdata) - 1  # `storage` above is one
        if not whole or holders != 1 or not storage.resizable():
            reason = f"{holders} tensors use its memory" if holders != 1 else "it is a view of a part of its memory"
            raise ValueError(
                f"{_OP}: release=True, but tensor {i} of the cache cannot shrink: {reason} (cache: {describe(x)}). "
                f"Drop the other tensors, or pass release=False."
            )


def _front(x: Tensor, shape: tuple[int, ...], release: bool) -> Tensor:
    """The moved rows at the front of x; with `release` x itself becomes them and returns the rest of its memory."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    if not release:
        return x.as_strided(shape, strides)
    storage = x.untyped_storage()
    x.set_(storage, 0, shape, strides)  # first: a tensor must never claim more than its storage holds
    storage.resize_(x.numel() * x.element_size())
    return x


def _in_place(cache: Cache, xs: list[Tensor], release: bool, ragged: bool, lists: tuple) -> list[Tensor]:
    keep, keep_of = lists[0], lists[2]
    fronts = [not cache.static and (ragged or x.is_contiguous()) for x in xs]
    placements = [IN_FRONT if front else IN_HEADS for front in fronts]
    for x, j in zip(xs, keep_of, strict=True):
        if not ragged and keep[j].shape[2] > x.shape[2]:
            raise ValueError(f"{_OP}: in place a head holds at most N={x.shape[2]} rows, keep has {keep[j].shape[2]}.")
    if not torch.compiler.is_compiling() and not xs[0].is_meta:
        _check_in_place(xs, placements)
        if release:
            _check_release(xs)
    with torch.no_grad():
        _repack_rows_(xs, *lists, placements, cache.static)
        mark_written(xs)
        results = []
        for x, j, front in zip(xs, keep_of, fronts, strict=True):
            rows = keep[j].shape[-1]
            shape = (rows, x.shape[3]) if ragged else (*x.shape[:2], rows, x.shape[3])
            results.append(_front(x, shape, release) if front else x[:, :, :rows])
    return results


def repack_kv(cache: Any, keep: Any, *, inplace: bool = False, release: bool = False, rope: Rope | None = None) -> Any:
    """Keeps some positions of a key and value cache, all layers in one call.

    Keys and values of a layer always move together, bit for bit unless `rope` turns the keys.

    Args:
        cache: `(keys, values)`, each a list of per-layer tensors `[B, H, N, D]` (or one such tensor); or a Hugging
            Face `DynamicCache` or `StaticCache`. Any real dtype and strides; D may differ between keys and values.
        keep: the positions that stay, strictly ascending within a head: a `Selection` (over the N positions, or
            over B * N: see `Selection.within`); int64 or int32 `[K]`, `[B, K]` or `[B, H, K]`, where a shorter list
            ends in -1, which gives zero rows to be masked; or, where heads keep different numbers, a `RaggedKeep`
            or nested lists `keep[b][h]` of tensors. One for all layers, or a list with one per layer.
        inplace: moves the rows to the front of the memory they are in and returns views of it. Rows only move
            towards the front, in ascending order, so none is overwritten before it is read.
        release: with `inplace=True` also returns the rest of the memory: every tensor shrinks to its kept rows and
            stays the same object. Refused unless it is the only one that uses its memory.
        rope: turns the keys to new positions, by default 0, 1, 2, ...; generation then goes on at position K.
            Without it the keys keep their old positions, and so must what follows.

    Returns:
        What was passed, with K rows: new `(keys, values)` lists, a new `DynamicCache`; with `inplace=True` the same
        cache. A `StaticCache`, in place only, keeps its buffers: rows move to their front, the rest becomes zero
        and its length K. A ragged keep gives a `PackedKV`, which holds exactly the kept rows.

    Raises:
        ValueError, TypeError: an argument breaks its rule, or the cache is of a kind that cannot be repacked.
        IndexError: a position is out of range. Positions are checked on the CPU; elsewhere a wrong one gives
            zero rows, never a read out of bounds.
        RuntimeError: the cache requires a gradient; this op has none.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> keys, values = [torch.arange(12.0).view(1, 1, 6, 2)], [torch.zeros(1, 1, 6, 2)]
        >>> (kept,), _ = ck.repack_kv((keys, values), torch.tensor([1, 4]))
        >>> kept
        tensor([[[[2., 3.],
                  [8., 9.]]]])
    """
    found = read_cache(_OP, cache)
    if release and not inplace:
        raise ValueError(f"{_OP}: release=True shrinks the tensors it is given. Pass inplace=True as well.")
    if found.static and (not inplace or release):
        raise ValueError(
            f"{_OP}: a StaticCache keeps its buffers. Pass inplace=True and release=False, or use a DynamicCache."
        )
    shapes = [(x.shape[0], x.shape[1], x.shape[2]) for x in found.keys]
    keeps, layer_keeps = keeps_of(_OP, keep, shapes, found.keys[0].device)
    ragged = isinstance(keeps[0], RaggedKeep)
    if ragged and any(shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"{_OP}: a ragged keep needs the same batch and heads in every layer. Repack layers apart.")
    if ragged and inplace and found.source is not None:
        raise ValueError(
            f"{_OP}: a ragged keep gives a PackedKV, which a {type(cache).__name__} cannot hold. "
            f"Pass inplace=False, or (keys, values)."
        )
    if rope is not None and any(x.dtype not in ROTATABLE for x in found.keys):
        raise TypeError(f"{_OP}: rope needs floating keys (keys: {describe(found.keys[0])}). Convert them first.")
    shape_of = [shapes[layer_keeps.index(j)] for j in range(len(keeps))]
    cos, sin = tables(_OP, rope, keeps, shape_of, min(x.shape[3] for x in found.keys))
    layers = len(shapes)
    index = [k.indices if isinstance(k, RaggedKeep) else k for k in keeps]
    cu_seqlens = [k.cu_seqlens for k in keeps if isinstance(k, RaggedKeep)]
    if any(k.shape[-1] == 0 for k in index):
        raise ValueError(f"{_OP}: keep is empty, and attention to an empty cache is NaN. Keep at least one position.")
    lists = (index, cu_seqlens, layer_keeps * 2, cos, sin, [rope is not None] * layers + [False] * layers)
    xs = [*found.keys, *found.values]
    results = _in_place(found, xs, release, ragged, lists) if inplace else _repack_rows(xs, *lists)
    keys, values = results[:layers], results[layers:]
    if ragged:
        bounds = tuple(cu_seqlens[j] for j in layer_keeps)
        return PackedKV(tuple(keys), tuple(values), bounds, shapes[0][0], shapes[0][1])
    return found.filled(keys, values, [index[j].shape[2] for j in layer_keeps], inplace)
