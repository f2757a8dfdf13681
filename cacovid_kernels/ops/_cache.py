"""The caches that repack_kv accepts: lists of tensors, and Hugging Face caches without importing transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import describe

_LAYERS = ("DynamicLayer", "StaticLayer")


@dataclass
class Cache:
    """Keys and values of every layer, `[B, H, N, D]`, and the object they came from."""

    keys: list[Tensor]
    values: list[Tensor]
    source: Any  # a Hugging Face cache, or None for lists
    static: bool  # buffers whose address and shape must stay

    def filled(self, keys: list[Tensor], values: list[Tensor], kept: list[int], inplace: bool) -> Any:
        """What the caller gets back: the cache with new tensors, `kept` rows in each layer."""
        if self.source is None:
            return keys, values
        if self.static:
            for layer, rows in zip(self.source.layers, kept, strict=True):
                length = getattr(layer, "cumulative_length", None)
                if length is not None:  # else the layer counts its rows that are not zero
                    length.fill_(rows)
            return self.source
        result = self.source
        if not inplace:
            result = copy.copy(self.source)
            result.layers = [copy.copy(layer) for layer in self.source.layers]
        for layer, key, value in zip(result.layers, keys, values, strict=True):
            layer.keys, layer.values = key, value
        return result


def _hugging_face(op: str, cache: Any) -> Cache:
    kind = type(cache).__name__
    if getattr(cache, "offloading", False):
        raise TypeError(
            f"{op}: cache is an offloading {kind}, its layers are not all on the device. "
            f"Pass a {kind} without offloading."
        )
    for i, layer in enumerate(cache.layers):
        name = type(layer).__name__
        if name not in _LAYERS:
            raise TypeError(
                f"{op}: cache layer {i} is a {name}, only {' and '.join(_LAYERS)} hold every position of a prompt as "
                f"plain tensors. Use a DynamicCache or StaticCache, and a model whose layers all attend to everything."
            )
    for i, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise ValueError(f"{op}: cache layer {i} of the {kind} is empty. Run the prompt through the model first.")
    static = [type(layer).__name__ == "StaticLayer" for layer in cache.layers]
    if any(static) and not all(static):
        raise TypeError(f"{op}: cache mixes static and dynamic layers. Use a cache of one kind.")
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    if any(static) and keys[0].device.type == "cpu":  # elsewhere the fill level stays on the device
        filled = [int(layer.get_seq_length()) for layer in cache.layers]
        keys = [k[:, :, :n] for k, n in zip(keys, filled, strict=True)]
        values = [v[:, :, :n] for v, n in zip(values, filled, strict=True)]
    return Cache(keys, values, cache, any(static))


def read_cache(op: str, cache: Any) -> Cache:
    """Keys and values of any accepted cache, or TypeError or ValueError naming what is wrong."""
    if hasattr(cache, "layers"):
        found = _hugging_face(op, cache)
    else:
        if not isinstance(cache, (list, tuple)) or len(cache) != 2:
            raise TypeError(
                f"{op}: cache is a {type(cache).__name__}, it must be (keys, values), a DynamicCache or a StaticCache. "
                f"Pairs per layer become (keys, values) by zip(*pairs)."
            )
        keys, values = ([x] if isinstance(x, Tensor) else list(x) for x in cache)
        found = Cache(keys, values, None, False)
    _check(op, found.keys, found.values)
    return found


def _check(op: str, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if len(keys) != len(values) or not keys:
        raise ValueError(f"{op}: cache has {len(keys)} keys and {len(values)} values, it must have one per layer.")
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        for name, x in zip(("keys", "values"), pair, strict=True):
            if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_complex() or x.is_quantized:
                raise TypeError(
                    f"{op}: {name} of layer {layer} must be a strided tensor, neither complex nor quantized, "
                    f"got {type(x).__name__}."
                )
            if x.dim() != 4 or x.shape[:3] != pair[0].shape[:3] or x.device != keys[0].device:
                raise ValueError(
                    f"{op}: {name} of layer {layer} must be [B, H, N, D] on {keys[0].device}, with B, H and N of "
                    f"its keys ({name}: {describe(x)}, keys: {describe(pair[0])})."
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{op}: has no gradient, but {name} of layer {layer} require one. Call it under torch.no_grad()."
                )
