"""Registration of the ops with torch: schema, fake, autograd, and the rule when a call goes through the dispatcher.

A call through `torch.library.custom_op` costs several times one through a defined op, and that more than a direct
call: so ops are defined here, and a public function calls its backend directly unless something has to see the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cacovid_kernels import _backend

NAMESPACE = "cacovid"
library = torch.library.Library(NAMESPACE, "DEF")
_HOST_TYPES = frozenset({int, float, bool, str, type(None)})
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch_level: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_jit_trace: Callable[[], Any] = torch._C._get_tracing_state


class Op:
    """One low-level op: `op(*args)` runs it, directly where nothing needs the dispatcher."""

    def __init__(self, family: str, schema: str, fake: Callable) -> None:
        self.name = schema[: schema.index("(")]
        self.family = family
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=library)
        self.dispatch = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def run(self, first: Any, *rest: Any) -> Any:
        """Runs the backend's function, unseen by the dispatcher."""
        tensor = first if isinstance(first, Tensor) else first[0]
        return _backend.implementation(self.family, self.name, tensor)(first, *rest)

    def __call__(self, *args: Any) -> Any:
        """Runs the op; the first argument is a tensor, or a list of tensors, of the device that serves it."""
        return self.dispatch(*args) if needs_dispatcher(args) else self.run(*args)


def needs_dispatcher(args: Any, autograd: bool = True) -> bool:
    """Whether tracing, autograd, vmap, a tensor subclass, a lazy negation or a dispatch mode has to see the op.

    Without `autograd` for a caller that tells eager autograd itself.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _functorch_level() is not None:
        return True
    if _jit_trace() is not None:
        raise RuntimeError(
            "cacovid_kernels: torch.jit.trace would not see what an op writes. Use torch.compile or torch.export."
        )
    grad = autograd and torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            if (grad and arg.requires_grad) or arg.is_neg():  # memory of a negated view holds other values
                return True
        elif kind is list:
            if arg and type(arg[0]) not in _HOST_TYPES and needs_dispatcher(arg, autograd):
                return True
        elif kind not in _HOST_TYPES:  # a tensor subclass, a symbolic size
            return True
    return False


def refuse_tangents(op: str, tensors: Sequence[Tensor]) -> None:
    """RuntimeError if a tensor carries a forward-mode derivative, which the op would drop silently."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{op}: it has no forward-mode derivative. Use reverse mode (backward, torch.func.vjp).")
