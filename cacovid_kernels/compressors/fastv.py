"""FastV: the tokens that the last word looks at in an early layer."""

from __future__ import annotations

from torch import Tensor

from cacovid_kernels.compressors._keep import can_be_read, check_count, keep_largest
from cacovid_kernels.ops.attention import attention_scores


def fastv(query: Tensor, keys: Tensor, video_mask: Tensor, num_tokens: int) -> Tensor:
    """Keep the video tokens with the largest attention of the prompt's last word, the mean over heads.

    Only the last row of the attention is computed, so the model may run any attention kernel.

    Args:
        query: `[..., H, D]` float32, bfloat16 or float16, of the last word in decoder layer 2
            (counted from 1), rotated and unscaled.
        keys: `[..., K, L, D]` of the same dtype, of the whole prompt in that layer, rotated; K divides H.
        video_mask: `[..., L]` bool, the video tokens; as many in every prompt.
        num_tokens: tokens kept per video, 0 to N; checked where reading `video_mask` does not wait for a GPU.

    Returns:
        `[..., num_tokens]` int64, ascending indices into the N video tokens.

    Raises:
        ValueError: a shape or a count does not fit.

    Example:
        >>> import torch
        >>> from cacovid_kernels.compressors import fastv
        >>> mask = torch.arange(120) < 98
        >>> fastv(torch.randn(4, 16), torch.randn(2, 120, 16), mask, 10).shape
        torch.Size([10])

    Source: FastV (arXiv 2403.06764), with its default layer.
    """
    heads, groups = query.shape[-2], keys.shape[-3]
    if heads % groups or query.shape[-1] != keys.shape[-1] or video_mask.shape[-1] != keys.shape[-2]:
        raise ValueError(
            f"fastv: query [..., H, D], keys [..., K, L, D] and video_mask [..., L] must fit "
            f"(query: {list(query.shape)}, keys: {list(keys.shape)}, video_mask: {list(video_mask.shape)})."
        )
    if can_be_read(video_mask):
        check_count("fastv", num_tokens, int(video_mask.sum(-1).min()) if video_mask.numel() else 0)
    lead, prompt = query.shape[:-2], keys.shape[-2]
    attention = attention_scores(
        query.detach().reshape(-1, heads, 1, query.shape[-1]), keys.detach().reshape(-1, *keys.shape[-3:])
    ).view(*lead, prompt)
    # Video tokens before all others, in the order of their attention; it may be NaN.
    kept = keep_largest(attention.nan_to_num(nan=-0.5).masked_fill(~video_mask, -1.0), num_tokens)
    return (video_mask.cumsum(-1) - 1).expand(attention.shape).gather(-1, kept)
