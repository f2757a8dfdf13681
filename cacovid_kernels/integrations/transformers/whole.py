"""What a caller gave to `generate` and looks at ids sees whole prompts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria


class WholePrompts:
    """Puts whole prompts in place of compressed ones.

    Args:
        ids: `[B, L]` whole prompts.
        length: of the compressed ones.
    """

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length = ids, length
        self._seen: dict[int, Any] = {}  # one for one, so that transformers finds again what it knows

    def __call__(self, ids: Tensor) -> Tensor:
        """`[B * copies, length + S]` -> `[B * copies, L + S]`."""
        prompts = self.ids.repeat_interleave(ids.shape[0] // self.ids.shape[0], 0).to(ids.device)
        return torch.cat([prompts, ids[:, self.length :]], 1)

    def shown_to(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` that look at ids, each looking at whole ones."""
        shown: dict[str, Any] = {}
        for name in ("logits_processor", "stopping_criteria"):
            if kwargs.get(name) is not None:
                shown[name] = type(kwargs[name])(self._looking(one) for one in kwargs[name])
        if kwargs.get("prefix_allowed_tokens_fn") is not None:
            allowed = kwargs["prefix_allowed_tokens_fn"]
            shown["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.ids[row].to(ids.device), ids[self.length :]])
            )
        if kwargs.get("streamer") is not None:
            shown["streamer"] = _Streamer(kwargs["streamer"], self)
        return shown

    def _looking(self, one: Any) -> Any:
        if id(one) not in self._seen:
            if isinstance(one, MaxLengthCriteria):
                shorter = copy.copy(one)
                shorter.max_length -= self.ids.shape[1] - self.length
                self._seen[id(one)] = shorter
            else:
                # Those of transformers look at what is new, or count as its own do; it knows them by their types.
                own = type(one).__module__.startswith("transformers.")
                self._seen[id(one)] = one if own else _Looking(one, self)
        return self._seen[id(one)]


class _Looking:
    """A processor of logits or a stopping criterion of somebody else, with its attributes."""

    def __init__(self, one: Any, whole: WholePrompts) -> None:
        self._one, self._whole = one, whole
        # The signature that transformers reads; a call of this object is that of its class.
        vars(self)["__call__"] = one.__call__

    def __call__(self, ids: Tensor, scores: Tensor, **named: Any) -> Any:
        return self._one(self._whole(ids), scores, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


class _Streamer:
    """A streamer whose first piece is the whole prompt."""

    def __init__(self, streamer: Any, whole: WholePrompts) -> None:
        self._streamer, self._whole, self._begun = streamer, whole, False

    def put(self, ids: Tensor) -> None:
        self._streamer.put(ids if self._begun else self._whole(ids))
        self._begun = True

    def end(self) -> None:
        self._streamer.end()
