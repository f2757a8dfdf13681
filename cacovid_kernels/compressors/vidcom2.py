"""VidCom2: tokens unlike their frame and their video, more of them from frames that stand out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels.compressors._keep import check_count, check_features, keep_largest, without_odd

_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
_TEMPERATURE = 0.01


def vidcom2(features: Tensor, num_tokens: int) -> Tensor:
    """Keep the tokens least like the centres of their video and of their frame, within a budget per frame.

    Frame budgets are those of the published rule, rescaled so that their sum is exact: the published rounding
    keeps a few tokens more or less than asked for.

    Args:
        features: `[..., T, P, C]` real, video tokens as the language model gets them. A token with a NaN or an
            infinity comes last and counts as zeros in the centres.
        num_tokens: tokens kept per video, 0 to T * P.

    Returns:
        `[..., num_tokens]` int64, ascending indices into the T * P tokens.

    Raises:
        ValueError: a shape or a count does not fit.

    Example:
        >>> import torch
        >>> from cacovid_kernels.compressors import vidcom2
        >>> vidcom2(torch.randn(8, 49, 32), 98).shape
        torch.Size([98])

    Source: VidCom2 (arXiv 2505.14454).
    """
    check_features("vidcom2", features)
    frames, places = features.shape[-3:-1]
    check_count("vidcom2", num_tokens, frames * places)
    if num_tokens == 0:
        return torch.zeros((*features.shape[:-3], 0), dtype=torch.int64, device=features.device)
    features, odd = without_odd(features)
    likeness, shares = scores_and_shares(features, num_tokens / (frames * places))
    # Every frame's tokens in order of merit; number r of a frame with share s comes at (r + 1/2) / s, so that
    # any prefix of all tokens divides among the frames as their shares do.
    merit = torch.argsort(likeness, dim=-1, stable=True)
    rank = torch.argsort(merit, dim=-1)
    turn = ((rank + 0.5) / shares[..., None]).masked_fill(odd, torch.inf)
    return keep_largest(-turn.flatten(-2), num_tokens)


def scores_and_shares(features: Tensor, keep_ratio: float) -> tuple[Tensor, Tensor]:
    """Likeness to the centres `[..., T, P]`, the least is kept first, and the share `[..., T]` kept of each frame."""
    flat = features.flatten(-3, -2)
    half = flat.var(-2).topk(flat.shape[-1] // 2, dim=-1, largest=False).indices  # channels that vary least
    steady = flat.gather(-1, half[..., None, :].expand(*flat.shape[:-1], -1))
    points = F.normalize(steady, dim=-1).unflatten(-2, features.shape[-3:-1])
    to_video = _gaussians(points - points.mean((-3, -2), keepdim=True))
    to_frame = _gaussians(points - points.mean(-2, keepdim=True))
    standing_out = torch.softmax(-to_video.mean(-1) / _TEMPERATURE, -1)
    shares = keep_ratio * (1 + standing_out - standing_out.mean(-1, keepdim=True))
    return to_video + to_frame, shares.clamp(max=1)


def _gaussians(difference: Tensor) -> Tensor:
    distance = difference.square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in _WIDTHS]).sum(0)
