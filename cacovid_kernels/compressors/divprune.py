"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels.compressors._keep import check_count, check_features, without_odd


def divprune(features: Tensor, num_tokens: int, *, order: str = "index") -> Tensor:
    """Choose tokens one by one, each the farthest by cosine from its nearest among those chosen.

    The first one is the token whose nearest other token is the farthest. A running minimum makes a step O(N)
    instead of one pass over the rows of all tokens chosen so far.

    Args:
        features: `[..., T, P, C]` real, video tokens as the language model gets them. A token with a NaN or an
            infinity comes last.
        num_tokens: tokens kept per video, 0 to T * P.
        order: "index" for ascending indices, "score" for the order of choice.

    Returns:
        `[..., num_tokens]` int64 indices into the T * P tokens.

    Raises:
        ValueError: a shape, a count or `order` does not fit.

    Example:
        >>> import torch
        >>> from cacovid_kernels.compressors import divprune
        >>> divprune(torch.randn(8, 49, 32), 39).shape
        torch.Size([39])

    Source: DivPrune (arXiv 2503.02175), max-min diversity.
    """
    check_features("divprune", features)
    if order not in ("index", "score"):
        raise ValueError(f'divprune: order={order!r} must be "index" or "score".')
    features, odd = without_odd(features.flatten(-3, -2))
    points = F.normalize(features, dim=-1)
    count = points.shape[-2]
    check_count("divprune", num_tokens, count)
    if num_tokens == 0:
        return points.new_zeros((*points.shape[:-2], 0), dtype=torch.int64)
    distance = (points @ points.transpose(-1, -2)).neg_().add_(1)  # [..., N, N], in place: the largest tensor here
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)  # no token is its own nearest other one
    nearest = distance.masked_fill_(odd[..., None, :], torch.inf).amin(-1).masked_fill(odd, -1.0)
    distance.masked_fill_(odd[..., None, :], -1.0)  # all others come before a token that is no number
    picked = []
    for step in range(num_tokens):
        pick = nearest.argmax(-1, keepdim=True)
        picked.append(pick)
        row = distance.gather(-2, pick[..., None].expand(*pick.shape, count)).squeeze(-2)
        nearest = row if step == 0 else torch.minimum(nearest, row)
        nearest = nearest.scatter(-1, torch.cat(picked, -1), -torch.inf)
    chosen = torch.cat(picked, -1)
    return chosen if order == "score" else chosen.sort(-1).values
