"""What a caller gave to `generate` and looks at ids sees whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WholePrompts:
    """Puts whole prompts in place of compressed ones.

    Args:
        ids: `[B, L]` whole prompts.
        length: of the compressed ones.
    """

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length = ids, length

    def __call__(self, ids: Tensor) -> Tensor:
        """`[B * copies, length + S]` -> `[B * copies, L + S]`."""
        prompts = self.ids.repeat_interleave(ids.shape[0] // self.ids.shape[0], 0).to(ids.device)
        return torch.cat([prompts, ids[:, self.length :]], 1)

    def shown_to(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` that look at ids, each looking at whole ones."""
        shown: dict[str, Any] = {}
        for name in ("logits_processor", "stopping_criteria"):
            if kwargs.get(name) is not None:
                shown[name] = type(kwargs[name])(self._looking(function) for function in kwargs[name])
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            allowed = kwargs["prefix_allowed_tokens_fn"]
            shown["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.ids[row].to(ids.device), ids[self.length :]])
            )
        if kwargs.get("streamer") is not None:
            shown["streamer"] = _Streamer(kwargs["streamer"], self)
        return shown

    def _looking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ids, scores, **named: function(self(ids), scores, **named)


class _Streamer:
    """A streamer whose first piece is the whole prompt."""

    def __init__(self, streamer: Any, whole: WholePrompts) -> None:
        self.streamer, self.whole, self.begun = streamer, whole, False

    def put(self, ids: Tensor) -> None:
        self.streamer.put(ids if self.begun else self.whole.ids.cpu())
        self.begun = True

    def end(self) -> None:
        self.streamer.end()
