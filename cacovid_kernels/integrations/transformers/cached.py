"""Video tokens leave the cache between the prompt and the first new token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cacovid_kernels._masks import masked_positions
from cacovid_kernels.integrations.transformers.attention import query_rows
from cacovid_kernels.integrations.transformers.prompt import Prompt
from cacovid_kernels.integrations.transformers.prune import Compacted
from cacovid_kernels.ops.attention import attention_scores
from cacovid_kernels.ops.repack import repack_kv

_WINDOW = 64  # rows at the end of the prompt that are asked, at most: a long text there would cost as many

# From scores [N] of the video tokens, or None where a selector has scored, to [K] that stay and how many per video.
Choice = Callable[[Tensor | None], tuple[Tensor, tuple[int, ...]]]


class CacheCompaction:
    """The calls of one `generate`: the first reads the whole prompt, the others see what was left of it.

    Args:
        prompt: the prompts.
        whole: the same as they are run, with all their video tokens but without columns that are padding in every row.
        choice: says what stays.
        attention: attention of the last layer where its queries score, else None.
        cache: empty, of this `generate` alone.

    Attributes:
        inputs: `attention_mask [B, K]` and `position_ids [..., B, K]` of what the cache holds of the prompts.
        kept: kept tokens per video.
    """

    def __init__(self, prompt: Prompt, whole: Compacted, choice: Choice, attention: Any, cache: Any) -> None:
        self.inputs: dict[str, Any] | None = None
        self.kept: tuple[int, ...] = ()
        self._mask, self._positions = whole.attention_mask != 0, whole.position_ids
        self._choice, self._attention, self._cache = choice, attention, cache
        self._videos = [(row, t * h * w) for row, (t, h, w) in zip(prompt.rows, prompt.grid_thw, strict=True)]
        self._lengths = prompt.lengths
        full, length = prompt.input_ids.shape[1], self._mask.shape[1]
        self._row, self._column = prompt.tokens // full, prompt.tokens % full - (full - length)
        self._query: Any = None  # [B * copies, H, R, D], once the prompt was read

    def before(self, named: dict[str, Any]) -> dict[str, Any]:
        """What a call of the model is to get."""
        if self.inputs is None:
            return named
        kept = self.inputs["attention_mask"]
        if named.get("attention_mask") is not None or len(set(self._lengths)) > 1:
            fed = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
            new = int(self._cache.get_seq_length()) - kept.shape[1] + fed.shape[1]
            kept = kept.repeat_interleave(len(fed) // len(kept), 0)
            named = {**named, "attention_mask": torch.cat([kept, kept.new_ones(len(kept), new)], 1)}
        return named

    def look(self, attention: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a call of the last layer's attention."""
        if self._query is None:
            self._query = query_rows(attention, arguments, named, min(_WINDOW, self._mask.shape[1]))

    def after(self) -> None:
        """Behind a call of the model."""
        if self.inputs is None:
            self._drop()

    def _drop(self) -> None:
        if not self._cache.get_seq_length():
            raise ValueError(
                "compress: stage='kv' found an empty cache behind the prompt, as gradient checkpointing in training "
                "mode leaves it. Call model.eval()."
            )
        copies = len(self._cache.layers[0].keys) // len(self._mask)  # beams or samples of one prompt, all alike so far
        indices, self.kept = self._choice(None if self._attention is None else self._scores(copies))
        lengths = list(self._lengths)
        for (row, tokens), kept in zip(self._videos, self.kept, strict=True):
            lengths[row] -= tokens - kept
        self._lengths = tuple(lengths)
        stays = self._mask.clone()
        stays[self._row, self._column] = False
        stays[self._row[indices], self._column[indices]] = True
        # Rows that keep fewer fill up with their first other columns, which stay masked.
        longest, (rows, length) = max(lengths), stays.shape
        fill = (~stays).cumsum(1) <= longest - stays.sum(1, keepdim=True)
        columns = masked_positions((stays | fill).flatten(), rows * longest).view(rows, longest) % length
        repack_kv(self._cache, columns.repeat_interleave(copies, 0), inplace=True, release=True)
        positions = self._positions
        self.inputs = {
            "attention_mask": stays.gather(1, columns).long(),
            "position_ids": positions.gather(-1, columns.expand(*positions.shape[:-1], longest)),
        }

    def _scores(self, copies: int) -> Tensor:
        """`[N]` attention of the text behind a prompt's last video to every video token."""
        query, length = self._query[::copies], self._mask.shape[1]
        last = self._column.new_full((len(self._mask),), -1).scatter_reduce(0, self._row, self._column, "amax")
        places = torch.arange(length - query.shape[2], length, device=last.device).expand(len(last), -1)
        scores = attention_scores(
            query,
            self._cache.layers[self._attention.layer_idx].keys[::copies],
            mask=self._mask,
            row_positions=places.masked_fill(places <= last[:, None], -1),
            scale=self._attention.scaling,
        )
        return scores[self._row, self._column]


@contextmanager
def hooked(model: Any, attention: Any) -> Iterator[dict[int, CacheCompaction]]:
    """Hooks on a model, and on its last layer's attention if given, for the length of a with block.

    They serve the compactions that are put into what this yields, by the `id` of their caches, which tell calls of one
    `generate` from those of other threads. Registered once: while a thread runs, no other may change hooks.
    """
    running: dict[int, CacheCompaction] = {}

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = running.get(id(named.get("past_key_values")))
        return None if found is None else (arguments, found.before(named))

    def look(attention: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if found := running.get(id(named.get("past_key_values"))):
            found.look(attention, arguments, named)

    def after(_: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        if found := running.get(id(named.get("past_key_values"))):
            found.after()

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    if attention is not None:
        handles.append(attention.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def own_cache(settings: Any) -> Any:
    """The empty cache that a `generate` with these settings fills.

    Raises:
        ValueError: it would run without one, or with one whose memory cannot be returned.
    """
    given, kind = settings["past_key_values"], settings["cache_implementation"]
    layers = {type(layer).__name__ for layer in getattr(given, "layers", ())} - {"DynamicLayer"}
    found = ""
    if settings["use_cache"] is False:
        found = "no cache"
    elif kind not in (None, "dynamic"):
        found = f"cache_implementation={kind!r}"
    elif given is not None and (not isinstance(given, DynamicCache) or layers or getattr(given, "offloading", False)):
        found = f"a {type(given).__name__}" + (f" of {sorted(layers)}" if layers else "")
    if found:
        raise ValueError(
            f"compress: stage='kv' frees memory of a DynamicCache on the device, but generate runs with {found}. "
            f"Leave use_cache, cache_implementation and past_key_values out, or use stage='prefill'."
        )
    return DynamicCache() if given is None else given
