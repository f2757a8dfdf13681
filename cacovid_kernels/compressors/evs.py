"""EVS: what changed since the previous frame stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels.compressors._keep import check_count, check_features, keep_largest, without_odd


def evs(features: Tensor, num_tokens: int) -> Tensor:
    """Keep the tokens least like the token at their place in the previous frame; the first frame comes first.

    Args:
        features: `[..., T, P, C]` real, video tokens as the language model gets them. A token with a NaN or an
            infinity comes last and counts as zeros for the others.
        num_tokens: tokens kept per video, 0 to T * P. The published rule never goes below the P of one frame.

    Returns:
        `[..., num_tokens]` int64, ascending indices into the T * P tokens.

    Raises:
        ValueError: a shape or a count does not fit.

    Example:
        >>> import torch
        >>> from cacovid_kernels.compressors import evs
        >>> evs(torch.randn(8, 49, 32), 98).shape
        torch.Size([98])

    Source: Efficient Video Sampling (arXiv 2510.14624), as in vLLM.
    """
    check_features("evs", features)
    frames, places = features.shape[-3:-1]
    check_count("evs", num_tokens, frames * places)
    features, odd = without_odd(features)
    change = 1 - F.cosine_similarity(features[..., 1:, :, :], features[..., :-1, :, :], dim=-1)
    first = torch.full_like(features[..., :1, :, 0], 255.0)
    return keep_largest(torch.cat([first, change], -2).masked_fill(odd, torch.nan).flatten(-2), num_tokens)
