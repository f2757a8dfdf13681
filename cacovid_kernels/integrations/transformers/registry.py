"""Which adapter serves a model."""

from __future__ import annotations

from typing import Any

from cacovid_kernels.integrations.transformers.adapter import Adapter
from cacovid_kernels.integrations.transformers.internvl import InternVL
from cacovid_kernels.integrations.transformers.llava_next_video import LlavaNextVideo
from cacovid_kernels.integrations.transformers.llava_onevision import LlavaOneVision
from cacovid_kernels.integrations.transformers.qwen2_5_vl import Qwen25VL
from cacovid_kernels.integrations.transformers.qwen2_vl import Qwen2VL
from cacovid_kernels.integrations.transformers.qwen3_vl import Qwen3VL
from cacovid_kernels.integrations.transformers.smolvlm import SmolVLM
from cacovid_kernels.integrations.transformers.video_llama_3 import VideoLlama3
from cacovid_kernels.integrations.transformers.video_llava import VideoLlava

_adapters: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Serve the models of `adapter.model_types` (`model.config.model_type`) with this adapter from now on.

    Args:
        adapter: an instance of a subclass of `Adapter`.
    """
    _adapters.update(dict.fromkeys(adapter.model_types, adapter))


for _family in (
    LlavaOneVision,
    LlavaNextVideo,
    VideoLlava,
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    InternVL,
    VideoLlama3,
    SmolVLM,
):
    register_adapter(_family())


def unwrapped(model: Any) -> Any:
    """The model of transformers inside what `torch.compile` or PEFT made of it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def adapter_of(model: Any) -> Adapter:
    """The adapter of an unwrapped model, or one line that says why it cannot be served."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _adapters:
        raise ValueError(
            f"prune_inputs: no adapter for {type(model).__name__} (model_type={kind!r}); known are "
            f"{sorted(_adapters)}. Subclass cacovid_kernels.integrations.transformers.Adapter and pass an instance "
            f"to register_adapter, as docs/integrations.md shows."
        )
    if not hasattr(model, "generate"):
        raise ValueError(
            f"prune_inputs: {type(model).__name__} cannot generate. Pass the ...ForConditionalGeneration model."
        )
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        names = ("sliding_window", "attention_chunk_size")
        kinds = [name for name in names if getattr(text, name, None)]
    others = set(kinds) - {"full_attention"}
    if others:
        raise ValueError(
            f"prune_inputs: the language model has layers of {sorted(others)}, which count tokens: dropping some would "
            f"let others see farther. Use a model whose layers attend to everything."
        )
    adapter = _adapters[kind]
    adapter.check(model)
    return adapter
