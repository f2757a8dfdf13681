"""Compaction: the kept tokens of any number of tensors, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels._library import NAMESPACE, Op, library, refuse_tangents
from cacovid_kernels.ops._checks import check_choice, check_same_device, describe
from cacovid_kernels.ops._overlap import check_outputs, mark_written
from cacovid_kernels.ops._structure import leaves, name_of, option_of, rebuild
from cacovid_kernels.selection import Selection

_OP = "gather_tokens"


def _fake_gather(xs, index, dims):
    shapes = [x.shape[:dim] + index.shape + x.shape[dim + 1 :] for x, dim in zip(xs, dims, strict=True)]
    return [x.new_empty(shape) for x, shape in zip(xs, shapes, strict=True)]


def _fake_scatter(grads, index, sizes, dims):
    return [
        grad.new_empty((*grad.shape[:dim], size, *grad.shape[dim + index.dim() :]))
        for grad, size, dim in zip(grads, sizes, dims, strict=True)
    ]


_gather_rows = Op("gather", "gather_rows(Tensor[] xs, Tensor index, int[] dims) -> Tensor[]", _fake_gather)
_gather_rows_out = Op(
    "gather",
    "gather_rows_out(Tensor[] xs, Tensor index, int[] dims, Tensor(a!)[] outs) -> ()",
    lambda xs, index, dims, outs: None,
)
_scatter_rows = Op(
    "gather",
    "scatter_rows(Tensor[] grads, Tensor index, SymInt[] sizes, int[] dims) -> Tensor[]",
    _fake_scatter,
)


def _keep_gather(ctx, inputs, output):
    xs, index, dims = inputs
    ctx.save_for_backward(index)
    ctx.dims, ctx.sizes = dims, [x.shape[dim] for x, dim in zip(xs, dims, strict=True)]
    ctx.set_materialize_grads(False)


def _gather_backward(ctx, grads):
    (index,) = ctx.saved_tensors
    needed = [t for t, needs in enumerate(ctx.needs_input_grad[0]) if needs and grads[t] is not None]
    results: list[Tensor | None] = [None] * len(ctx.dims)
    if needed:
        sizes, dims = [ctx.sizes[t] for t in needed], [ctx.dims[t] for t in needed]
        sums = _scatter_rows([grads[t] for t in needed], index, sizes, dims)
        for t, result in zip(needed, sums, strict=True):
            results[t] = result
    return results, None, None


def _keep_scatter(ctx, inputs, output):
    _, index, _, dims = inputs
    ctx.save_for_backward(index)
    ctx.dims = dims
    ctx.set_materialize_grads(False)


def _scatter_backward(ctx, grads):
    (index,) = ctx.saved_tensors
    needed = [t for t, needs in enumerate(ctx.needs_input_grad[0]) if needs and grads[t] is not None]
    results: list[Tensor | None] = [None] * len(ctx.dims)
    if needed:
        dims = [ctx.dims[t] for t in needed]
        for t, result in zip(needed, _gather_rows([grads[t] for t in needed], index, dims), strict=True):
            results[t] = result
    return results, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::gather_rows", _gather_backward, setup_context=_keep_gather, lib=library)
torch.library.register_autograd(
    f"{NAMESPACE}::scatter_rows", _scatter_backward, setup_context=_keep_scatter, lib=library
)


def _index_of(selection: Any, layout: str) -> Tensor:
    if isinstance(selection, Selection):
        packed = layout == "packed"
        return selection.indices if packed else selection.padded_indices(layout.removeprefix("padded_"))
    index = selection if isinstance(selection, Tensor) else getattr(selection, "indices", None)
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{_OP}: selection is a {type(selection).__name__}, "
            f"it must be a Selection, Combinations or an index tensor. Wrap a list of positions in torch.tensor."
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{_OP}: selection must be int64 or int32 (selection: {describe(index)}). "
            f"Pass mask.nonzero() made once, or the Selection itself."
        )
    if layout != "packed":
        raise ValueError(
            f'{_OP}: layout={layout!r} needs a Selection, which knows its videos. Pass layout="packed": '
            f"the result has the shape of the index (selection: {describe(index)})."
        )
    return index


def _token_shapes(selection: Any, num_tokens: int) -> list[tuple[int, ...]]:
    """The shapes in which all tokens of a selection may lie: [N], [B, N / B], [T, P], [B, T, P]."""
    shapes: list[tuple[int, ...]] = [(num_tokens,)]
    grid = getattr(selection, "grid_thw", ())
    if grid and all(video == grid[0] for video in grid[1:]):  # a set would hash, hence fix, symbolic sizes
        b, (t, h, w) = len(grid), grid[0]
        shapes += [(b, t * h * w), (b * t, h * w), (b, t, h * w)]
    return shapes


def _token_axis(x: Tensor, path: tuple, shapes: list[tuple[int, ...]]) -> tuple[Tensor, int]:
    """`x` with its tokens along one axis, and that axis."""
    for shape in shapes:
        for dim in range(x.dim() - len(shape) + 1):
            if all(x.shape[dim + i] == n for i, n in enumerate(shape)):  # as tuples symbolic sizes would be fixed
                return x if len(shape) == 1 else x.flatten(dim, dim + len(shape) - 1), dim
    raise ValueError(
        f"{_OP}: no axis of {name_of(path)} has the {shapes[0][0]} tokens of the selection "
        f"(tensor: {describe(x)}). Pass the tensor that was scored, or name its token axis with dim."
    )


def _sources(selection: Any, tensors: list[tuple[tuple, Tensor]], dim: Any) -> tuple[list[Tensor], list[int]]:
    grid = getattr(selection, "grid_thw", None)
    num_tokens = None if grid is None else sum(t * h * w for t, h, w in grid)
    xs, dims = [], []
    for path, x in tensors:
        if x.is_complex() or x.is_quantized or x.layout is not torch.strided:
            raise TypeError(
                f"{_OP}: {name_of(path)} must be strided and neither complex nor quantized "
                f"(tensor: {describe(x)}). Pass torch.view_as_real(x) or x.to_dense()."
            )
        axis = option_of(dim, path, None)
        if axis is None and num_tokens is None and x.dim():
            axis = 0  # an index does not say how many tokens there are: the first tensor does
        if axis is None:
            x, axis = _token_axis(x, path, _token_shapes(selection, 0 if num_tokens is None else num_tokens))
        elif not -x.dim() <= axis < x.dim():
            raise ValueError(f"{_OP}: dim={axis} is no axis of {name_of(path)} (tensor: {describe(x)}).")
        axis %= max(x.dim(), 1)
        num_tokens = x.shape[axis] if num_tokens is None else num_tokens
        xs.append(x)
        dims.append(axis)
    return xs, dims


def _gather(xs: list[Tensor], index: Tensor, dims: list[int]) -> list[Tensor]:
    """One call, or one for what needs a gradient and one for the rest, which stays without."""
    refuse_tangents(_OP, xs)
    needs = [x.requires_grad and torch.is_grad_enabled() for x in xs]
    if all(needs) or not any(needs):
        return _gather_rows(xs, index, dims)
    results: list[Any] = [None] * len(xs)
    for group in (True, False):
        chosen = [i for i, need in enumerate(needs) if need is group]
        gathered = _gather_rows([xs[i] for i in chosen], index, [dims[i] for i in chosen])
        for i, result in zip(chosen, gathered, strict=True):
            results[i] = result
    return results


def _check_range(index: Tensor, size: int) -> None:
    outside = (index < -1) | (index >= size)
    if outside.any():
        raise IndexError(
            f"{_OP}: the index holds {index[outside][0].item()}, it must be -1 (padding) or in [0, {size}) "
            f'(index: {describe(index)}). Correct it, or pass check="flag" to get zeros there.'
        )


def gather_tokens(
    tensors: Any,
    selection: Any,
    *,
    layout: str = "packed",
    dim: int | Sequence[int] | Mapping[Any, int] | None = None,
    pad_value: float | Mapping[Any, float] = 0,
    out: Any = None,
    check: str = "flag",
) -> Any:
    """Gathers the kept tokens of any number of tensors: embeddings, position ids, masks, labels, features.

    All tensors go through one native call. Values are copied bit for bit. Where a tensor needs a gradient it
    is the adjoint: rows gathered more than once are summed in ascending position of the index, in float32
    (float64 for float64), rounded once; it is differentiable again.

    Args:
        tensors: a tensor, or a dict, list or tuple of tensors, nested as deep as you like; None entries stay.
            Any real dtype, any strides, at most 8 dimensions.
        selection: what to keep: a `Selection`; `Combinations`, whose G combinations all read the one copy of
            the tensors; or an int64 or int32 index of any shape, where -1 is padding.
        layout: "packed" replaces the token axis by the K kept tokens of all videos; "padded_left" and
            "padded_right" replace it by (B, longest), one row per video. An index replaces it by its own
            shape.
        dim: the token axis; one for all tensors, or one per entry of the outermost dict or list. By default
            the first axis whose size is the selection's number of tokens, or the adjacent axes (B, N / B),
            (T, P) or (B, T, P) that hold them all; if these cannot be viewed as one axis they are copied
            first. For an index: axis 0 of the first tensor, then the first axis of that size.
        pad_value: what padding holds, one for all or one per entry of the outermost dict (0 if not named).
        out: preallocated results, nested as `tensors`; shape and dtype must match exactly. No gradient.
        check: "flag" gives zeros for an index outside [-1, N); "raise" makes it an error, which reads one
            value on the host.

    Returns:
        The gathered tensors, nested as `tensors`, contiguous; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.
        IndexError: with `check="raise"`, an index is out of range.
        RuntimeError: a gradient is asked for together with `out`, or a forward-mode derivative.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> kept = ck.segmented_topk(torch.tensor([0.1, 0.9, 0.2, 0.8]), 2, cu_seqlens=[0, 4])
        >>> prompt = {"embeds": torch.eye(4), "position_ids": torch.arange(12).reshape(3, 4)}
        >>> ck.gather_tokens(prompt, kept)["position_ids"]
        tensor([[ 1,  3],
                [ 5,  7],
                [ 9, 11]])

    Source: CaCoVID (arXiv 2602.01649), published `compression_policy.py`, where embeddings, position ids and
    mask are indexed one by one with a boolean mask.
    """
    check_choice(_OP, "layout", layout, ("packed", "padded_left", "padded_right"))
    check_choice(_OP, "check", check, ("flag", "raise"))
    index = _index_of(selection, layout)
    found = leaves(_OP, tensors)
    xs, dims = _sources(selection, found, dim)
    for path, x in found:
        if x.device != index.device:
            check_same_device(_OP, "selection", index, name_of(path), x)
    if check == "raise":
        for size in {x.shape[d] for x, d in zip(xs, dims, strict=True)}:
            _check_range(index, size)
    if out is None:
        results = _gather(xs, index, dims) if xs else []
    else:
        results = [x for _, x in leaves(_OP, out)]
        shapes = [x.shape[:d] + index.shape + x.shape[d + 1 :] for x, d in zip(xs, dims, strict=True)]
        check_outputs(_OP, [x for _, x in found], shapes, results)
        if xs:
            _gather_rows_out(xs, index, dims, results)
            mark_written(results)
    for i, (path, _) in enumerate(found):
        value = option_of(pad_value, path, 0)
        if value != 0:
            padding = (index < 0).reshape(index.shape + (1,) * (xs[i].dim() - dims[i] - 1))
            fill = results[i].masked_fill_ if out is not None else results[i].masked_fill
            results[i] = fill(padding, value)
    return rebuild(tensors, iter(results)) if out is None else out
