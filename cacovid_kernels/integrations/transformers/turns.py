"""Another question on the cache of a compressed prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def next_turn(
    previous: Mapping[str, Any], cache: Any, token_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of `model.generate` for text that follows a prompt whose cache exists.

    Args:
        previous: what `prune_inputs` returned for the prompt, or what this function returned for the last question.
        cache: `past_key_values` that generating from `previous` left; it is extended in place.
        token_ids: `[B, S]`, everything behind `previous`: the answer as generated, then the next question.
        attention_mask: `[B, S]`, 0 at padding among them (rows that ended early, questions padded on the left);
            all real when absent.

    Returns:
        `input_ids [B, S']` (what the cache lacks), `attention_mask` over everything, `position_ids` that go on from
        the last position of the prompt, and `past_key_values`.

    Raises:
        ValueError: the cache is not that of `previous` and the start of `token_ids`, as far as its size tells: that
            of another prompt which kept as many tokens looks the same.

    Example:
        >>> import torch
        >>> from cacovid_kernels.integrations.transformers import next_turn
        >>> class Cache:  # of a prompt of 3 tokens and 1 of the 2 that were generated
        ...     def get_seq_length(self):
        ...         return 4
        >>> prompt = {"attention_mask": torch.ones(1, 3).long(), "position_ids": torch.tensor([[0, 7, 8]])}
        >>> question = next_turn(prompt, Cache(), torch.tensor([[11, 12, 21, 22]]))
        >>> question["input_ids"], question["position_ids"]
        (tensor([[12, 21, 22]]), tensor([[10, 11, 12]]))
    """
    if previous is None or cache is None:
        raise ValueError(
            f"next_turn: {'previous' if previous is None else 'the cache'} is None. Generate once, with "
            f"return_dict_in_generate=True, and pass what that left."
        )
    before, positions = previous["attention_mask"], previous["position_ids"]
    mask = torch.ones_like(token_ids) if attention_mask is None else attention_mask.to(before.dtype)
    if token_ids.shape[0] != before.shape[0] or mask.shape != token_ids.shape:
        raise ValueError(
            f"next_turn: token_ids {list(token_ids.shape)} and attention_mask {list(mask.shape)} must be "
            f"[B={before.shape[0]}, S]."
        )
    keys = next((getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())), None)
    if keys is not None and keys.shape[0] != before.shape[0]:
        raise ValueError(
            f"next_turn: the cache holds {keys.shape[0]} rows, the prompt {before.shape[0]}. Pass the cache of this "
            f"prompt, from generating without beams or several samples."
        )
    cached = int(cache.get_seq_length()) - before.shape[1]
    if not 0 <= cached < token_ids.shape[1]:
        raise ValueError(
            f"next_turn: the cache holds {cached + before.shape[1]} tokens, it must hold the {before.shape[1]} of the "
            f"prompt and some of the {token_ids.shape[1]} in token_ids. Pass the cache of this prompt."
        )
    # Columns of padding repeat the position before them, which nobody sees.
    positions = positions[..., -1:] + mask.cumsum(1)
    return {
        "input_ids": token_ids[:, cached:],
        "attention_mask": torch.cat([before, mask], 1),
        "position_ids": positions[..., cached:],
        "past_key_values": cache,
    }
