"""Masks of combinations at one bit per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cacovid_kernels._library import Op
from cacovid_kernels.ops._checks import describe
from cacovid_kernels.ops._draws import as_int

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def words_of(tokens: Any) -> Any:
    """Words of 32 bits that hold a mask."""
    return (tokens + 31) // 32


_pack_masks = Op(
    "policy_loss",
    "pack_masks(Tensor masks) -> Tensor",
    lambda masks: masks.new_empty(masks.shape[0], words_of(masks.shape[1]), dtype=torch.int32),
)
_pack_indices = Op(
    "policy_loss",
    "pack_indices(Tensor indices, SymInt num_tokens) -> Tensor",
    lambda indices, num_tokens: indices.new_empty(indices.shape[0], words_of(num_tokens), dtype=torch.int32),
)


def check_tensor(op: str, name: str, x: Any, dtypes: tuple[torch.dtype, ...], rule: str) -> None:
    """A strided tensor of one of the dtypes, which `rule` names, or TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}. Wrap it in torch.tensor.")
    if x.dtype not in dtypes or x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be {rule} ({name}: {describe(x)}). Convert it.")


def pack_masks(masks: Tensor | None = None, *, indices: Tensor | None = None, num_tokens: int | None = None) -> Tensor:
    """Masks of combinations at one bit per token, as the policy loss reads and a replay memory keeps them.

    Args:
        masks: `[..., N]` bool or integers; what is not 0 is kept.
        indices: instead of masks, `[..., K]` int64 positions of the kept tokens, such as `Combinations.indices`; what
            lies outside [0, num_tokens), such as the padding -1, marks nothing.
        num_tokens: N, with `indices`.

    Returns:
        `[..., ceil(N / 32)]` int32 words. Bit i % 32 of word i // 32 is token i; bits beyond N are 0.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> ck.pack_masks(torch.tensor([[True, False, True]]))
        tensor([[5]], dtype=torch.int32)
        >>> ck.pack_masks(indices=torch.tensor([[2, 0, -1]]), num_tokens=3)
        tensor([[5]], dtype=torch.int32)
    """
    op = "pack_masks"
    if (masks is None) == (indices is None) or (indices is None) != (num_tokens is None):
        raise ValueError(f"{op}: pass either masks, or indices and num_tokens.")
    if masks is not None:
        check_tensor(op, "masks", masks, INTEGERS, "bool or integers")
        if masks.dim() < 1:
            raise ValueError(f"{op}: masks must be [..., N] (masks: {describe(masks)}). Add a dimension.")
        rows = masks if masks.dim() == 2 else masks.reshape(masks.shape[:-1].numel(), masks.shape[-1])
        words = _pack_masks(rows)
        return words if masks.dim() == 2 else words.view(*masks.shape[:-1], words.shape[1])
    check_tensor(op, "indices", indices, (torch.int64,), "int64")
    assert indices is not None  # for mypy
    num_tokens = as_int(op, "num_tokens", num_tokens)
    if num_tokens < 1 or indices.dim() < 1:
        raise ValueError(
            f"{op}: num_tokens={num_tokens} must be positive and indices [..., K] (indices: {describe(indices)})."
        )
    words = _pack_indices(indices.reshape(indices.shape[:-1].numel(), indices.shape[-1]), num_tokens)
    return words.view(*indices.shape[:-1], words.shape[1])
