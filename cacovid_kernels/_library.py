"""Registration of the ops with torch: schema, fake, autograd, and the rule when a call goes through the dispatcher.

`torch.library.custom_op` costs 8 to 23 us a call, a defined op 4, a direct call 2: so ops are defined here,
and a public function calls its backend directly unless something has to see the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels import _backend

NAMESPACE = "cacovid"
library = torch.library.Library(NAMESPACE, "DEF")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch_level: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


class Op:
    """One low-level op: `op(*args)` runs it, directly where nothing needs the dispatcher."""

    def __init__(self, family: str, schema: str, fake: Callable) -> None:
        self.name = schema[: schema.index("(")]
        self.family = family
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=library)
        self.dispatch = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def _run(self, *args: Any) -> Any:
        return _backend.implementation(self.family, self.name, _device_of(args))(*args)

    def __call__(self, *args: Any) -> Any:
        return self.dispatch(*args) if needs_dispatcher(args) else self._run(*args)


def _tensors(args: Any) -> Any:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            yield from arg


def _device_of(args: Any) -> torch.device:
    return next(_tensors(args)).device


def needs_dispatcher(args: Any) -> bool:
    """Whether tracing, autograd, vmap, a tensor subclass or a dispatch mode has to see the op."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _functorch_level() is not None:
        return True
    grad = torch.is_grad_enabled()
    return any(type(t) not in _PLAIN_TYPES or (grad and t.requires_grad) for t in _tensors(args))
