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


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common; also true if that is hard to say, because their strides differ.

    Views that interleave, such as the keys and the values of every page of one tensor, have none.
    """
    if not overlaps(byte_range(a), byte_range(b)):
        return False
    axes = []  # step of both, size of a, size of b
    for step, other, n, m in zip(a.stride(), b.stride(), a.shape, b.shape, strict=True):
        if max(n, m) > 1:
            axes.append((step, n, m))
            if step != other or step == 0:
                return True

    def meet(distance: int, axes: list[tuple[int, int, int]]) -> bool:
        """Whether an element of a is one of b, which begins `distance` elements before a."""
        if not axes:
            return distance == 0
        (step, n, m), *inner = axes
        ahead, behind = sum(s * (i - 1) for s, i, _ in inner), sum(s * (j - 1) for s, _, j in inner)
        first, last = max(1 - m, -((distance + ahead) // step)), min(n - 1, (behind - distance) // step)
        return any(meet(distance + k * step, inner) for k in range(first, last + 1))

    distance, rest = divmod(a.data_ptr() - b.data_ptr(), a.element_size())
    return a.element_size() != b.element_size() or rest != 0 or meet(distance, sorted(axes, reverse=True))


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
