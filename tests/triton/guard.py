"""A memory and race checker for kernels that run in Triton's interpreter.

The interpreter reads and writes host memory through raw addresses and runs programs one after another, so that a
stray access, a race between programs or an overflowing int32 goes unnoticed. Inside `guarded()` every launch is
watched: each live lane has to be inside the strided footprint of an argument, no two programs may touch one element
unless both only read it or both use atomics, no store may write one element twice, and integer overflow raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2
_builder = interpreter.interpreter_builder
_Builder = interpreter.InterpreterBuilder


class GuardError(AssertionError):
    """A kernel touched what it must not."""


def footprint(x: torch.Tensor) -> np.ndarray:
    """Addresses of the first bytes of the elements that shape and strides of `x` reach."""
    offsets = np.zeros(1 if x.numel() else 0, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return (x.data_ptr() + offsets * x.element_size()).astype(np.uint64)


def _tensors(args: object) -> Iterator[torch.Tensor]:
    if isinstance(args, torch.Tensor):
        yield args
    elif isinstance(args, (list, tuple)):
        for arg in args:
            yield from _tensors(arg)


class _Launch:
    """What the programs of one launch have done to the elements they may touch."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        parts = [(footprint(x), x.element_size()) for x in tensors]
        starts = np.concatenate([addresses for addresses, _ in parts] or [np.empty(0, np.uint64)])
        sizes = np.concatenate([np.full(len(a), size, np.uint8) for a, size in parts] or [np.empty(0, np.uint8)])
        self.elements, first = np.unique(starts, return_index=True)
        self.sizes = sizes[first]
        self.writer, self.reader, self.updater = (np.full(len(self.elements), NOBODY, np.int64) for _ in range(3))

    def find(self, what: str, pointers: np.ndarray, mask: np.ndarray, width: int) -> np.ndarray:
        """Numbers of the elements that the live lanes point to."""
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        live = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape).astype(bool)].astype(np.uint64)
        at = np.searchsorted(self.elements, live)
        inside = at < len(self.elements)
        inside[inside] = self.elements[at[inside]] == live[inside]
        inside[inside] = self.sizes[at[inside]] == width
        if not inside.all():
            raise GuardError(
                f"{what}: {np.count_nonzero(~inside)} of {live.size} lanes are outside every argument, "
                f"program {_builder.grid_idx}"
            )
        return at

    def _conflict(self, what: str, at: np.ndarray, *others: np.ndarray) -> None:
        me = program()
        for owner in others:
            if ((owner[at] != NOBODY) & (owner[at] != me)).any():
                raise GuardError(f"race: program {_builder.grid_idx} {what} an element that another program touched")

    def load(self, at: np.ndarray) -> None:
        self._conflict("reads", at, self.writer, self.updater)
        self.reader[at] = np.where((self.reader[at] == NOBODY) | (self.reader[at] == program()), program(), SEVERAL)

    def store(self, at: np.ndarray) -> None:
        if np.unique(at).size != at.size:
            raise GuardError(f"race: one store of program {_builder.grid_idx} writes an element twice")
        self._conflict("writes", at, self.writer, self.reader, self.updater)
        self.writer[at] = program()

    def update(self, at: np.ndarray) -> None:
        self._conflict("updates", at, self.writer, self.reader)
        self.updater[at] = np.where((self.updater[at] == NOBODY) | (self.updater[at] == program()), program(), SEVERAL)


def program() -> int:
    """The running program as one number."""
    x, y, z = _builder.grid_idx
    return (z << 42) | (y << 21) | x


def _width(pointers) -> int:
    """Bytes of what a block of pointers points to."""
    return max(pointers.dtype.scalar.element_ty.primitive_bitwidth // 8, 1)


@contextmanager
def guarded() -> Iterator[None]:
    """Watches every launch inside the `with` block; raises GuardError, or what the interpreter makes of overflow."""
    executor = interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    real = {name: getattr(_Builder, name) for name in names}
    real_call, real_options = executor.__call__, _builder.options
    current: list[_Launch] = []

    def launch(self, *args, **kwargs):
        current.append(_Launch(list(_tensors([*args, *kwargs.values()]))))
        try:
            return real_call(self, *args, **kwargs)
        finally:
            current.pop()

    def load(self, pointers, mask, *rest):
        current[-1].load(current[-1].find("load", pointers.data, mask.data, _width(pointers)))
        return real["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        current[-1].store(current[-1].find("store", pointers.data, mask.data, _width(pointers)))
        return real["create_masked_store"](self, pointers, value, mask, *rest)

    def update(self, operation, pointers, value, mask, *rest):
        current[-1].update(current[-1].find("atomic", pointers.data, mask.data, _width(pointers)))
        return real["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def swap(self, pointers, *rest):
        current[-1].update(current[-1].find("atomic", pointers.data, np.ones((), bool), _width(pointers)))
        return real["create_atomic_cas"](self, pointers, *rest)

    executor.__call__ = launch
    for name, checked in zip(names, (load, store, update, swap), strict=True):
        setattr(_Builder, name, checked)
    _builder.options = interpreter.InterpreterOptions(debug=True)
    try:
        yield
    finally:
        executor.__call__ = real_call
        for name, function in real.items():
            setattr(_Builder, name, function)
        _builder.options = real_options
