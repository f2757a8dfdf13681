"""Checks and numbers shared by the ops that draw random samples."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.ops._checks import describe
from cacovid_kernels.reference.random import FIRST_RESERVED_STREAM

MOST_SAMPLES = 2**24


def as_int(op: str, name: str, value: Any) -> Any:
    """A plain or symbolic int from whatever counts as one, or TypeError."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}={value!r} must be an integer. Pass a Python int.") from None


def check_key(
    op: str, seed: Any, step: Any, device: torch.device, stream: Any = 0
) -> tuple[int, int, Tensor | None, int]:
    """Seed, as the signed 64-bit number with the same bits, step, a tensor to add to it, and stream; or ValueError."""
    added_steps = None
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1 or step.device != device:
            raise ValueError(
                f"{op}: step must be an int, or one int64 on {device} (step: {describe(step)}). "
                f"Pass torch.tensor(step, device={str(device)!r})."
            )
        step, added_steps = 0, step.reshape(())
    seed, step, stream = as_int(op, "seed", seed), as_int(op, "step", step), as_int(op, "stream", stream)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed={seed} must be in [-2^63, 2^64). Its 64 bits are the key.")
    if not 0 <= step < 2**32:
        raise ValueError(f"{op}: step={step} must be in [0, 2^32). Pass the number of the training step.")
    if not 0 <= stream < FIRST_RESERVED_STREAM:
        raise ValueError(f"{op}: stream={stream} must be in [0, {FIRST_RESERVED_STREAM}). Higher ones are reserved.")
    return seed - 2**64 if seed >= 2**63 else seed, step, added_steps, stream


def check_samples(op: str, name: str, value: Any, least: int) -> int:
    """`value` as an int in [least, 2^24], or ValueError."""
    value = as_int(op, name, value)
    if not least <= value <= MOST_SAMPLES:
        raise ValueError(f"{op}: {name}={value} must be in [{least}, 2^24]. Draw the rest at another step.")
    return value
