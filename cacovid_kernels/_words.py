"""Rank words, `csrc/include/cacovid/order.h`: one integer per candidate, which orders by score, then by position."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_words(words: Tensor, first: int, tokens: int) -> None:
    """Turns the rank words of each video, `[B, K]`, into flat positions by falling score, in place.

    The words differ from each other, so any sort gives one order, and torch has a fast one for rows of any length.
    """
    ranked = torch.sort(words, descending=True).values
    start = torch.arange(words.shape[0], device=words.device)[:, None] * tokens + first
    torch.add(ranked.bitwise_not_().bitwise_and_(0xFFFFFFFF), start, out=words)
