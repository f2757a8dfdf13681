"""Selection together with what a prompt needs of it: layout and rows of the kept tokens, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels._library import NAMESPACE, Op, library, refuse_tangents
from cacovid_kernels.ops._checks import check_same_device, describe
from cacovid_kernels.ops.gather import _scatter_rows


def _fake(token_scores, frame_scores, grid_thw, num_keep, *rest):
    tokens, kept = rest[-1], sum(num_keep)
    frames, videos = sum(grid_thw[::3]), len(num_keep)

    def new(*shape, dtype):
        return token_scores.new_empty(shape, dtype=dtype)

    return (
        new(kept, dtype=torch.int64),
        new(frames, dtype=torch.int64),
        new(frames, dtype=torch.int32),
        new(videos + 1, dtype=torch.int32),
        new(token_scores.numel(), dtype=torch.bool),
        new(3, kept, dtype=torch.int64),
        token_scores.new_empty(0) if tokens is None else tokens.new_empty(kept, tokens.shape[1]),
    )


select_kept = Op(
    "select",
    "select_kept(Tensor token_scores, Tensor? frame_scores, SymInt[] grid_thw, SymInt[] num_keep, float? keep_ratio, "
    "float importance_ratio, float? max_frame_ratio, bool strict, bool fill, Tensor? tokens) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _setup(ctx, inputs, output):
    tokens = inputs[-1]
    ctx.arguments, ctx.sizes = len(inputs), None if tokens is None else [tokens.shape[0]]
    ctx.save_for_backward(output[0])


def _backward(ctx, *grads):
    (indices,) = ctx.saved_tensors
    none: list[Tensor | None] = [None] * (ctx.arguments - 1)
    grad = grads[-1]
    return *none, None if ctx.sizes is None or grad is None else _scatter_rows([grad], indices, ctx.sizes, [0])[0]


torch.library.register_autograd(f"{NAMESPACE}::select_kept", _backward, setup_context=_setup, lib=library)


def check_tokens(op: str, tokens: Tensor, scores: Tensor) -> None:
    """Raises unless `tokens` can be gathered by a selection of `scores`."""
    if not isinstance(tokens, Tensor) or tokens.is_complex() or tokens.is_quantized or tokens.layout != torch.strided:
        raise TypeError(f"{op}: tokens must be a strided tensor, neither complex nor quantized.")
    if tokens.dim() != 2 or tokens.shape[0] != scores.numel():
        raise ValueError(
            f"{op}: tokens must be [N, D] with a row for each of the {scores.numel()} scores "
            f"(tokens: {describe(tokens)}). Flatten what is before the last axis."
        )
    check_same_device(op, "tokens", tokens, "token_scores", scores)
    refuse_tangents(op, [tokens])
