"""`generate` on compressed prompts for the length of a with block."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cacovid_kernels.integrations.transformers.adapter import VISION_INPUTS
from cacovid_kernels.integrations.transformers.cached import CacheCompaction
from cacovid_kernels.integrations.transformers.prompt import all_tokens, read
from cacovid_kernels.integrations.transformers.prune import arguments, compact
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.integrations.transformers.selectors import (
    Selector,
    check_counts,
    check_options,
    check_selector,
    choose,
)
from cacovid_kernels.ops._checks import check_choice

_OP = "compress"
_ASSISTED = "assisted decoding guesses and crops by ids and positions of whole prompts, which a compressed one lacks"
_REFUSED = {
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "prefill_chunk_size": "chunks are cut from the ids, not from the embeddings of a compressed prompt",
}
_PROMPT = VISION_INPUTS | {"attention_mask"}


class Compression:
    """What `compress` yields.

    Attributes:
        inputs: arguments the last `generate` ran on, as `prune_inputs` returns them (for `next_turn`); None before.
            With `stage="kv"` only `attention_mask [B, L']` and `position_ids`, of what its cache kept of the prompts.
        kept: kept tokens per video of the last `generate`.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.kept: tuple[int, ...] = ()


@contextmanager
def compress(
    model: Any,
    selector: Selector | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: Any = None,
    budget: str | None = None,
    stage: str = "prefill",
    **options: Any,
) -> Iterator[Compression]:
    """Inside the block `model.generate(**inputs)` drops video tokens; afterwards the model is as it was.

    Everything else about `generate` stays: what it returns starts with the whole prompt, `max_length` counts the
    whole prompt, beams and sampling work. Calls without pixels, such as those of `next_turn`, run as they are.

    Args:
        model, selector, keep_ratio, num_tokens, budget, options: as in `prune_inputs`. With `stage="kv"` the selector
            may be left out: then the attention of the last layer scores, the mean over heads, that the text behind
            the last video of a prompt (at most 64 tokens, to its end) pays to the video tokens; its budget is
            "video" unless given.
        stage: "prefill" drops tokens before the language model, which then never sees them. "kv" lets it read the
            whole prompt and drops them from the cache of every layer before the second new token, in place, with the
            memory returned; the first new token is the untouched model's. Needs a `DynamicCache`.

    Yields:
        A `Compression`, whose `inputs` and `kept` tell of the last call.

    Raises:
        ValueError: as `prune_inputs`; assisted decoding, chunks of a prompt; a cache that holds another prompt; with
            `stage="kv"` no cache, or one that is not a `DynamicCache`.

    Example:
        >>> from cacovid_kernels.compressors import divprune
        >>> from cacovid_kernels.integrations.transformers import compress
        >>> def answer(model, processor, messages):
        ...     inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
        ...                                            return_dict=True, return_tensors="pt").to(model.device)
        ...     with compress(model, divprune, keep_ratio=0.1):
        ...         ids = model.generate(**inputs, max_new_tokens=64)
        ...     return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    """
    adapter = adapter_of(model)
    check_choice(_OP, "stage", stage, ("prefill", "kv"))
    if selector is not None:
        check_selector(selector, keep_ratio, num_tokens, budget, options)
    elif stage == "kv":
        check_options(None, keep_ratio, num_tokens, budget, options)
    else:
        raise ValueError(f"{_OP}: stage='prefill' needs a selector, nothing has attended yet. Or pass stage='kv'.")
    original, state = model.generate, Compression()

    @functools.wraps(original)
    def generate(inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(adapter.pixels) is None:
            return original(inputs, generation_config, *args, **kwargs)
        config = model.generation_config if generation_config is None else generation_config
        _check_mode(config, kwargs)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in _PROMPT}
        given["input_ids"] = ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        with torch.no_grad():
            prompt = read(model, adapter, given)
            check_counts(prompt, keep_ratio, num_tokens)
            choice = functools.partial(choose, selector, prompt, keep_ratio, num_tokens, budget, options)
            every = all_tokens(prompt)
            chosen = every if selector is None else choice()
            compacted, _ = compact(prompt, *(every if stage == "kv" else chosen))
        made = arguments(model, adapter, given, compacted)
        length = compacted.input_ids.shape[1]
        kwargs |= _lengths(config, kwargs, ids.shape[1] - length)
        # With the ids beside the embeddings processors of logits see the prompt's text as they would without us.
        named = {**made, "input_ids": compacted.input_ids, **kwargs}
        if stage == "prefill":
            state.inputs, state.kept = made, compacted.lengths
            del prompt, choice, compacted  # embeddings and features at full length, larger than the cache to come
            out = original(None, generation_config, *args, **named)
        else:
            attention = adapter.last_attention(model) if selector is None else None
            cached = CacheCompaction(prompt, compacted, choice if selector is None else lambda _: chosen, attention)
            with cached.hooks(model):
                out = original(None, generation_config, *args, **named)
            state.inputs, state.kept = cached.inputs, cached.kept
        return _whole_prompts(out, ids, length)

    own = vars(model).get("generate")
    model.generate = generate
    try:
        yield state
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own


def _check_mode(config: Any, kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if kwargs.get(name, getattr(config, name, None)) is not None:
            raise ValueError(f"{_OP}: {name} is set, but {reason}. Leave it out.")
    cache = kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(
            f"{_OP}: past_key_values hold {int(cache.get_seq_length())} tokens of another prompt, and a prompt with a "
            f"video starts anew. Pass an empty cache or none; for a second question on this cache use next_turn."
        )


def _lengths(config: Any, kwargs: dict[str, Any], dropped: int) -> dict[str, int]:
    """Limits on the length of prompt and answer, for a prompt that is shorter."""
    limits = {}
    if kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None)) is None:
        limits["max_length"] = kwargs.get("max_length", getattr(config, "max_length", None))
    limits["min_length"] = kwargs.get("min_length", getattr(config, "min_length", None))
    return {name: max(limit - dropped, 0) for name, limit in limits.items() if limit}


def _whole_prompts(out: Any, ids: Any, length: int) -> Any:
    """What `generate` returned, with the whole prompts `ids` in front of what was generated."""
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    prompts = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0).to(sequences.device)
    whole = torch.cat([prompts, sequences[:, length:]], 1)
    if sequences is out:
        return whole
    out.sequences = whole
    return out
