"""Scorers of kvpress, with caches compacted by `repack_kv`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cacovid_kernels.ops.repack import repack_kv

try:
    from kvpress import ScorerPress
    from kvpress.utils import compute_n_kept
except ImportError as error:
    raise ImportError(
        f"cacovid_kernels.integrations.kvpress needs kvpress ({error}). Install it: "
        f"pip install 'cacovid-kernels[kvpress]'."
    ) from error

_OF_KVPRESS = ("compress", "forward_hook", "__call__")  # what a scorer leaves to its base class


class RepackPress(ScorerPress):
    """A scorer of kvpress whose choice `repack_kv` carries out.

    It keeps the positions that the scorer alone would keep, and as many, but in the order of the prompt (kvpress
    orders them by score), keys and values in one call. It is a `ScorerPress` itself: `with press(model):` compresses
    the prefill, and kvpress's pipeline takes it. As everywhere in kvpress, rows of a batch must not be padded, and
    what follows goes on at the position behind the whole prompt.

    Args:
        press: a `ScorerPress`, such as `KnormPress(0.5)` or `SnapKVPress(0.9)`. Its `compression_ratio` r in [0, 1)
            is the share of the N positions that is dropped; max(1, floor(N (1 - r))) stay, in every head its own.

    Raises:
        TypeError: `press` is no `ScorerPress`, or one that does more than score.
        RuntimeError: in the prefill, where keys require a gradient; run it under `torch.no_grad()`.

    Example:
        >>> import torch
        >>> from kvpress import KnormPress
        >>> from cacovid_kernels.integrations.kvpress import RepackPress
        >>> def prefill(model, ids, cache):
        ...     with torch.no_grad(), RepackPress(KnormPress(compression_ratio=0.5))(model):
        ...         return model(ids, past_key_values=cache)
    """

    def __init__(self, press: ScorerPress) -> None:
        if not isinstance(press, ScorerPress):
            raise TypeError(
                f"RepackPress: {type(press).__name__} is no ScorerPress. Pass a press with scores, such as KnormPress."
            )
        own = [name for name in _OF_KVPRESS if getattr(type(press), name) is not getattr(ScorerPress, name)]
        if own:
            raise TypeError(
                f"RepackPress: {type(press).__name__} has {own[0]} of its own, which would be lost. Use it as it is."
            )
        self.press = press

    @property  # type: ignore[misc]
    def compression_ratio(self) -> float:
        """Of the scorer, where wrappers of kvpress set it."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def post_init_from_model(self, model: Any) -> None:
        """Lets the scorer read the model."""
        self.press.post_init_from_model(model)

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """Scores `[B, H, N]` of the scorer for keys and values `[B, H, N, D]`, larger = kept first."""
        return self.press.score(module, hidden_states, keys, values, attentions, kwargs)

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, K, D]` in memory of their own: the K positions with the best scores, ascending."""
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        keep = scores.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1).indices.sort(-1).values
        (keys,), (values,) = repack_kv(([keys], [values]), keep)
        return keys, values
