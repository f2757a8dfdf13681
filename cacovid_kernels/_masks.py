"""Turning a mask into positions when the count is already known on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_positions(mask: Tensor, count: int) -> Tensor:
    """Positions of the first `count` true entries of a mask, ascending, without a host read.

    Args:
        mask: `[N]` bool.
        count: number of true entries, known on the host.

    Returns:
        `[count]` int64. Entries beyond the number of true ones are N.
    """
    # The j-th true entry is the first position where the running count reaches j.
    ranks = torch.arange(1, count + 1, device=mask.device)
    return torch.searchsorted(mask.cumsum(0), ranks)
