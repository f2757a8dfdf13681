"""`generate` on compressed prompts for the length of a with block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from cacovid_kernels.integrations.transformers.adapter import VISION_INPUTS
from cacovid_kernels.integrations.transformers.cached import CacheCompaction, hooked, own_cache
from cacovid_kernels.integrations.transformers.prompt import all_tokens, read
from cacovid_kernels.integrations.transformers.prune import arguments, compact
from cacovid_kernels.integrations.transformers.registry import adapter_of, unwrapped
from cacovid_kernels.integrations.transformers.selectors import (
    Selector,
    check_counts,
    check_options,
    check_selector,
    choose,
)
from cacovid_kernels.integrations.transformers.whole import WholePrompts
from cacovid_kernels.ops._checks import check_choice

_OP = "compress"
_ASSISTED = "assisted decoding guesses and crops by ids and positions of whole prompts, which a compressed one lacks"
_BY_IDS = "it reads the ids of the prompt, in whose place embeddings go in"
_REFUSED = {
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "encoder_repetition_penalty": _BY_IDS,
    "encoder_no_repeat_ngram_size": _BY_IDS,
    "prefill_chunk_size": "chunks are cut from the ids, not from the embeddings of a compressed prompt",
}
_NEUTRAL = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
_MADE = ("inputs_embeds", "position_ids", "mm_encoder_outputs", "labels")
_PROMPT = VISION_INPUTS | {"attention_mask", "input_ids"}


class Compression:
    """What `compress` yields.

    Attributes:
        inputs: arguments the last `generate` ran on, as `prune_inputs` returns them (for `next_turn`); None before.
            With `stage="kv"` only `attention_mask [B, L']` and `position_ids`, of what its cache kept of the prompts.
        kept: kept tokens per video of the last `generate`.
        active: whether its block is still open.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None
        self.kept: tuple[int, ...] = ()
        self.active = True


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
    whole prompt, processors of logits, stopping criteria and streamers see it, beams and sampling work. Calls without
    pixels, such as those of `next_turn`, run as they are.

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
        ValueError: as `prune_inputs`; assisted decoding, chunks of a prompt, penalties on its ids; a cache that holds
            another prompt; with `stage="kv"` no cache, or one that is not a `DynamicCache`; a block inside another.

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
    inner = unwrapped(model)
    adapter = adapter_of(inner)
    check_choice(_OP, "stage", stage, ("prefill", "kv"))
    if selector is not None:
        check_selector(selector, keep_ratio, num_tokens, budget, options)
    elif stage == "kv":
        check_options(None, keep_ratio, num_tokens, budget, options)
    else:
        raise ValueError(f"{_OP}: stage='prefill' needs a selector, nothing has attended yet. Or pass stage='kv'.")
    if hasattr(model.generate, "compression"):
        where = "is in the block of another compress. Leave that one first"
        if not model.generate.compression.active:
            where = "was copied in the block of another compress. Give it its own: del model.generate"
        raise ValueError(f"{_OP}: this model {where}.")
    original, state = model.generate, Compression()
    attention = adapter.last_attention(inner) if selector is None else None

    @functools.wraps(original)
    def generate(inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(adapter.pixels) is None:
            return original(inputs, generation_config, *args, **kwargs)
        kwargs |= _by_name(original, args)
        settings = _Settings(kwargs, generation_config, inner.generation_config)
        _check_mode(settings, inputs, kwargs)
        given = {name: kwargs[name] for name in kwargs if name in _PROMPT}
        ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        given["input_ids"] = ids
        with torch.no_grad():
            prompt = read(inner, adapter, given, {name: settings[name] for name in ("pad_token_id", "eos_token_id")})
            if not prompt.grid_thw:  # frames and images look alike until now
                state.inputs, state.kept = None, ()
                return original(inputs, generation_config, **_without_notes(kwargs))
            check_counts(prompt, keep_ratio, num_tokens)
            choice = functools.partial(choose, selector, prompt, keep_ratio, num_tokens, budget, options)
            every = all_tokens(prompt)
            chosen = every if selector is None else choice()
            compacted, _ = compact(prompt, *(every if stage == "kv" else chosen))
        made = arguments(inner, adapter, given, compacted)
        length = compacted.input_ids.shape[1]
        whole = WholePrompts(ids, length)
        others = {name: value for name, value in kwargs.items() if name not in given}
        others |= whole.shown_to(kwargs) | _lengths(settings, ids.shape[1] - length)
        # With the ids beside the embeddings processors of logits see the prompt's text as they would without us.
        named = {**made, "input_ids": compacted.input_ids, **others}
        if stage == "prefill":
            state.inputs, state.kept = made, compacted.lengths
            del prompt, choice, compacted  # embeddings and features at full length, larger than the cache to come
            out = original(None, generation_config, **named)
        else:
            cache = own_cache(settings)
            cached = CacheCompaction(
                prompt, compacted, choice if selector is None else lambda _: chosen, attention, cache
            )
            running[id(cache)] = cached
            try:
                own_one = {"past_key_values": cache, "cache_implementation": None}
                out = original(None, generation_config, **{**named, **own_one})
            finally:
                del running[id(cache)]
            if cached.inputs is None:
                raise RuntimeError(
                    f"{_OP}: stage='kv' saw no call of {type(inner).__name__}, so nothing was dropped: its generate "
                    f"runs another module. Pass that module."
                )
            state.inputs, state.kept = cached.inputs, cached.kept
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        if sequences is out:
            return whole(out)
        out.sequences = whole(sequences)
        return out

    generate.compression = state  # type: ignore[attr-defined]
    own = vars(model).get("generate")
    model.generate = generate
    hooks: AbstractContextManager[Any] = hooked(inner, attention) if stage == "kv" else nullcontext()
    try:
        with hooks as running:
            yield state
    finally:
        state.active = False
        if own is None:
            del model.generate
        else:
            model.generate = own


def _by_name(function: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments behind the first two of `generate`, by their names."""
    names = list(inspect.signature(function).parameters)[2 : 2 + len(args)]
    if len(names) < len(args):
        raise ValueError(f"{_OP}: generate got {2 + len(args)} arguments without a name. Name all but the first two.")
    return dict(zip(names, args, strict=True))


class _Settings:
    """Settings of a call of `generate`: its arguments, then its config, then the model's."""

    def __init__(self, call: dict[str, Any], *configs: Any) -> None:
        self._sources = call, *configs

    def __getitem__(self, name: str) -> Any:
        call, *configs = self._sources
        if name in call:  # None among them: it overrules the configs
            return call[name]
        return next((x for x in (getattr(config, name, None) for config in configs) if x is not None), None)


def _check_mode(settings: _Settings, inputs: Any, kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if settings[name] not in (None, _NEUTRAL.get(name)):
            raise ValueError(f"{_OP}: {name} is set, but {reason}. Leave it out.")
    for name in _MADE:
        if kwargs.get(name) is not None:
            raise ValueError(f"{_OP}: {name} is given, but it is made here from the whole prompt. Leave it out.")
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise ValueError(f"{_OP}: the prompt is given twice, as inputs and as input_ids. Leave one out.")
    cache = kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(
            f"{_OP}: past_key_values hold {int(cache.get_seq_length())} tokens of another prompt, and a prompt with a "
            f"video starts anew. Pass an empty cache or none; for a second question on this cache use next_turn."
        )


def _without_notes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that transformers knows."""
    return {name: value for name, value in kwargs.items() if name != "visuals"}


def _lengths(settings: _Settings, dropped: int) -> dict[str, int]:
    """Limits on the length of prompt and answer, for a prompt that is shorter."""
    limits = {"min_length": settings["min_length"]}
    if settings["max_new_tokens"] is None:
        limits["max_length"] = settings["max_length"]
    return {name: max(limit - dropped, 0) for name, limit in limits.items() if limit}
