"""What a few query rows pay to every key, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_of_products(query: Tensor, keys: Tensor) -> Tensor:
    """The usual lines, in the dtype of the model: repeated keys, products, a float32 softmax, the mean."""
    repeated = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = query @ repeated.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32).mean((1, 2))


def fewest_copies(query: Tensor, keys: Tensor) -> Tensor:
    """The same with the rows of a key head side by side, so that keys are read once."""
    rows = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1]) * query.shape[-1] ** -0.5
    return (rows @ keys.transpose(-1, -2)).softmax(-1, dtype=torch.float32).mean(2).mean(1)
