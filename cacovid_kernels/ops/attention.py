"""How much attention a few rows of a prompt pay to every key."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from cacovid_kernels._library import Op, refuse_tangents
from cacovid_kernels.ops._checks import check_same_device, check_scores, check_tensor, describe

_OP = "attention_scores"


def _fake(query, keys, mask, row_positions, scale, per_head):
    b, k, n = keys.shape[:3]
    return keys.new_empty((b, k, n) if per_head else (b, n), dtype=torch.float32)


# query [B, H, R, D], keys [B, K, L, D], mask [B, L], row_positions [B, R] int64 -> [B, L], or [B, K, L] per key head.
_attention_scores = Op(
    "attention",
    "attention_scores(Tensor query, Tensor keys, Tensor? mask, Tensor? row_positions, float scale, bool per_head) "
    "-> Tensor",
    _fake,
)


def attention_scores(
    query: Tensor,
    keys: Tensor,
    *,
    mask: Tensor | None = None,
    row_positions: Tensor | None = None,
    scale: float | None = None,
    per_head: bool = False,
) -> Tensor:
    """The attention that a few query rows pay to every key, the mean over rows and heads.

    Of the attention matrix only these rows exist, a few at a time, so the model itself may run any attention kernel.
    What a compressor of a cache needs: FastV's last word, SnapKV's window or the words of a question. Pooling over
    neighbouring keys is left to the caller. The mean, not the sum: batch members may have different numbers of rows.

    Args:
        query: `[B, H, R, D]` the rows' queries, rotated and unscaled; float32, bfloat16 or float16.
        keys: `[B, K, L, D]` keys of the whole prompt, rotated; K divides H, as in a Hugging Face cache. Dtype of
            `query`.
        mask: `[B, L]` bool, False for keys that nobody sees (padding). Without it there are none.
        row_positions: `[R]` or `[B, R]` int64, where along L each row stands: it sees the keys up to and including
            itself. A row at -1 sees nothing, which is how batch members with fewer rows are padded. Without it every
            row sees all keys, as those of the last word do.
        scale: multiplies the products; by default `D ** -0.5`.
        per_head: one score per key for each of the K heads, for caches whose heads keep different tokens, instead of
            their mean.

    Returns:
        Scores `[B, L]`, with `per_head` `[B, K, L]`, float32. They add up to 1 over L. Rows that see no key do not
        count; where no row sees one all scores are 0, and so is every score of a masked key, whatever it holds. A row
        with a NaN or +inf among the products that it sees, or -inf alone, makes the scores of all keys it sees NaN,
        as softmax does. There is no gradient.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.
        RuntimeError: `query` or `keys` require a gradient.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> query, keys = torch.randn(1, 8, 3, 64), torch.randn(1, 2, 500, 64)
        >>> scores = ck.attention_scores(query, keys, row_positions=torch.arange(497, 500))
        >>> kept = ck.segmented_topk(scores, 50)
        >>> scores.shape, kept.shape
        (torch.Size([1, 500]), torch.Size([50]))

    Source: FastV (arXiv 2403.06764) for one row, SnapKV (arXiv 2404.14469) for several.
    """
    check_scores(_OP, "query", query)
    check_scores(_OP, "keys", keys)
    _check_shapes(query, keys)
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
        raise RuntimeError(f"{_OP}: has no gradient, but query or keys require one. Call it under torch.no_grad().")
    refuse_tangents(_OP, (query, keys))
    (b, _, r, d), n = query.shape, keys.shape[2]
    if mask is not None:
        check_tensor(_OP, "mask", mask, "[B, L] bool")  # no sizes: as text they would be fixed while compiling
        if mask.dtype != torch.bool or mask.shape != (b, n):
            raise ValueError(
                f"{_OP}: mask must be [B={b}, L={n}] bool (mask: {describe(mask)}). Call .bool() on a 0/1 mask."
            )
        check_same_device(_OP, "mask", mask, "keys", keys)
    if row_positions is not None:
        check_tensor(_OP, "row_positions", row_positions, "[R] or [B, R] int64")
        if row_positions.dtype != torch.int64 or row_positions.shape not in ((r,), (b, r)):
            raise ValueError(
                f"{_OP}: row_positions must be [R={r}] or [B={b}, R={r}] int64 "
                f"(row_positions: {describe(row_positions)}). Pass one position along L for each row of query."
            )
        check_same_device(_OP, "row_positions", row_positions, "keys", keys)
        row_positions = row_positions.expand(b, r)
    if scale is None:
        scale = d**-0.5
    elif not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"{_OP}: scale={scale} must be a finite number.")
    return _attention_scores(query, keys, mask, row_positions, float(scale), bool(per_head))


def _check_shapes(query: Tensor, keys: Tensor) -> None:
    if query.dtype != keys.dtype:
        raise TypeError(
            f"{_OP}: query and keys must have one dtype (query: {describe(query)}; keys: {describe(keys)}). "
            f"Convert the query."
        )
    fits = query.dim() == 4 and keys.dim() == 4 and query.shape[0] == keys.shape[0]
    if not fits or query.shape[3] != keys.shape[3] or keys.shape[1] < 1 or query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"{_OP}: query must be [B, H, R, D] and keys [B, K, L, D], where K divides H "
            f"(query: {describe(query)}; keys: {describe(keys)})."
        )
    if query.shape[1] < 1 or query.shape[3] < 1:
        raise ValueError(f"{_OP}: there must be heads and columns (query: {describe(query)}).")
    check_same_device(_OP, "query", query, "keys", keys)
