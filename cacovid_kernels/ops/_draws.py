"""Checks and numbers shared by the ops that draw random samples."""

from __future__ import annotations

from cacovid_kernels.reference.random import FIRST_RESERVED_STREAM

MOST_SAMPLES = 2**24


def check_key(op: str, seed: int, step: int, stream: int = 0) -> int:
    """The seed as the signed 64-bit number with the same bits, or ValueError."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed={seed} must be in [-2^63, 2^64). Its 64 bits are the key.")
    if not 0 <= step < 2**32:
        raise ValueError(f"{op}: step={step} must be in [0, 2^32). Pass the number of the training step.")
    if not 0 <= stream < FIRST_RESERVED_STREAM:
        raise ValueError(f"{op}: stream={stream} must be in [0, {FIRST_RESERVED_STREAM}). Higher ones are reserved.")
    return seed - 2**64 if seed >= 2**63 else seed


def check_samples(op: str, name: str, value: int, least: int) -> None:
    """`value` is in [least, 2^24], or ValueError."""
    if not least <= value <= MOST_SAMPLES:
        raise ValueError(f"{op}: {name}={value} must be in [{least}, 2^24].")
