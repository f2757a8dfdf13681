"""Tokens that stand for the rest: density peaks of their features."""

from __future__ import annotations

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import describe
from cacovid_kernels.ops.select import segmented_topk

_OP = "density_peaks"


def density_peaks(features: Tensor, k: int, *, num_neighbors: int = 4) -> Tensor:
    """Choose k tokens of every frame that lie in dense places, far from any denser one.

    A token's density is exp(-mean squared distance to its nearest neighbours, itself among them), distances
    being divided by sqrt(D). Its score is that density times the distance to the nearest token of higher
    density, or, where there is none, the largest distance of the frame.

    Args:
        features: `[..., P, D]`, one frame (or any set of tokens) per leading index; computed in float32.
        k: tokens to choose, in [0, P].
        num_neighbors: neighbours that a density is taken from, at least 1; all P where P is smaller.

    Returns:
        `[..., k]` int64, ascending positions in [0, P). Equal scores go to the lower index, and of tokens of
        equal density none counts as denser. A token whose score is NaN ranks last.

    Raises:
        ValueError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch
        >>> from cacovid_kernels.compressors.density import density_peaks
        >>> features = torch.tensor([[0.0], [0.1], [0.3], [5.0], [5.1], [5.3]])
        >>> density_peaks(features, 2, num_neighbors=3)
        tensor([1, 4])

    Source: Rodriguez and Laio, "Clustering by fast search and find of density peaks" (Science, 2014), with the
    k-nearest-neighbour density of Du et al. (2016); CaCoVID's content combination, published `div_sample`,
    which adds noise below 1e-6 to the densities.
    """
    if features.dim() < 2 or not features.dtype.is_floating_point:
        raise ValueError(f"{_OP}: features must be floating [..., P, D] (features: {describe(features)}).")
    size = features.shape[-2]
    if not 0 <= k <= size:
        raise ValueError(f"{_OP}: k={k} must be in [0, P={size}] (features: {describe(features)}). Lower k.")
    if num_neighbors < 1:
        raise ValueError(f"{_OP}: num_neighbors={num_neighbors} must be at least 1.")
    if k == 0 or features.shape[:-2].numel() == 0:
        return torch.empty(*features.shape[:-2], k, dtype=torch.int64, device=features.device)
    return _peaks(_scores(features.detach().float(), min(num_neighbors, size)), k)


def _scores(features: Tensor, num_neighbors: int) -> Tensor:
    """`[..., P, D]` -> `[..., P]`."""
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5  # [..., P, P]
    nearest = distance.topk(num_neighbors, dim=-1, largest=False).values
    density = (-nearest.square().mean(-1)).exp()  # [..., P]
    denser = density.unsqueeze(-2) > density.unsqueeze(-1)  # [..., P, P]: column is denser than row
    farthest = distance.amax((-2, -1), keepdim=True)
    return torch.where(denser, distance, farthest).amin(-1) * density


def _peaks(scores: Tensor, k: int) -> Tensor:
    """Positions `[..., k]` of the largest scores of each row, ascending."""
    lead, size = scores.shape[:-1], scores.shape[-1]
    flat = segmented_topk(scores.reshape(lead.numel(), size), k)
    first = torch.arange(0, lead.numel() * size, size, device=scores.device)
    return (flat.reshape(-1, k) - first[:, None]).reshape(*lead, k)
