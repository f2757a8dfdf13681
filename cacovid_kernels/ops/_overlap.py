"""Outputs that the caller preallocated: their shapes, and that they share no memory with what is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import describe


def byte_range(x: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last one that a strided tensor may touch."""
    if x.is_contiguous():
        return x.data_ptr(), x.data_ptr() + x.nbytes
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def overlaps(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def has_broadcast_axis(x: Tensor) -> bool:
    """Whether several elements are surely the same memory."""
    strides = x.stride()
    return 0 in strides and any(n > 1 and s == 0 for n, s in zip(x.shape, strides, strict=True))


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that tensors changed, where a backend was called past the dispatcher."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def check_outputs(op: str, inputs: Sequence[Tensor], shapes: Sequence[Sequence[int]], outs: Sequence[Tensor]) -> None:
    """`outs` have the given shapes, the inputs' dtypes and devices, and memory of their own, or an error."""
    if len(outs) != len(inputs):
        raise ValueError(f"{op}: out holds {len(outs)} tensors for {len(inputs)}. Nest it as the tensors.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *outs)):
        raise RuntimeError(
            f"{op}: out= has no gradient, but a tensor requires one. Drop out=, or call under torch.no_grad()."
        )
    for x, shape, out in zip(inputs, shapes, outs, strict=True):
        if out.dtype != x.dtype or out.device != x.device or out.shape != tuple(shape):
            raise ValueError(
                f"{op}: out must be {list(shape)} {str(x.dtype).removeprefix('torch.')} {x.device}, is {describe(out)}."
            )
    if torch.compiler.is_compiling() or any(out.is_meta for out in outs):
        return  # no addresses
    written = [byte_range(out) for out in outs]
    taken = [byte_range(x) for x in inputs] + written
    for i, out in enumerate(outs):
        others = taken[: len(inputs) + i] + taken[len(inputs) + i + 1 :]
        if has_broadcast_axis(out) or any(overlaps(written[i], other) for other in others):
            raise ValueError(
                f"{op}: out (out: {describe(out)}) shares memory with an input, another output "
                f"or itself. Allocate it separately."
            )
