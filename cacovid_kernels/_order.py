"""Which GPU backend answers an op under "auto": one table, by op and shape."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """The backend for first tensors of up to `most` elements."""

    most: float
    backend: str
    reason: str


ALL = float("inf")
# Files under bench/results/ that the rules rest on. None: their order is a guess from instruction and byte counts.
MEASURED: tuple[str, ...] = ()

_LATENCY = "the time of one launch: no Python between the check of its arguments and the driver"
_LONG = "a row may be long: several programs share one, a CUDA block takes it alone"
_COPY = "as many bytes in flight, and a launch that costs less"
TABLE: dict[str, tuple[Rule, ...]] = {
    "sample_combinations": (Rule(ALL, "cuda", _LATENCY),),
    "gumbel_topk": (Rule(2**20, "cuda", _LATENCY), Rule(ALL, "triton", _LONG)),
    "allocate_budget": (Rule(ALL, "cuda", _LATENCY),),
    "select_tokens": (Rule(2**18, "cuda", _LATENCY), Rule(ALL, "triton", _LONG)),
    "segmented_topk": (Rule(2**18, "cuda", _LATENCY), Rule(ALL, "triton", _LONG)),
    "select_kept": (Rule(ALL, "cuda", "rows are copied by the launch that selects them"),),
    "pack_masks": (Rule(ALL, "cuda", _LATENCY),),
    "pack_indices": (Rule(ALL, "cuda", _LATENCY),),
    "policy_sums": (Rule(ALL, "cuda", _LATENCY),),
    "policy_loss": (Rule(ALL, "cuda", _LATENCY),),
    "policy_loss_once": (Rule(ALL, "cuda", _LATENCY),),
    "policy_loss_backward": (Rule(ALL, "cuda", _LATENCY),),
    "gather_rows": (Rule(ALL, "cuda", _COPY),),
    "gather_rows_out": (Rule(ALL, "cuda", _COPY),),
    "repack_pages": (Rule(ALL, "cuda", _COPY),),
    "repack_rows": (Rule(ALL, "cuda", _COPY),),
    "repack_rows_": (Rule(ALL, "cuda", _COPY),),
}
_ELSE = (Rule(ALL, "triton", "there is no CUDA kernel for it"),)


def rules(op: str) -> tuple[Rule, ...]:
    """The rules of an op, by rising size."""
    return TABLE.get(op, _ELSE)


def order(op: str, elements: int) -> tuple[str, ...]:
    """The GPU backends that can serve an op whose first tensor has so many elements, the better one first."""
    best = next(rule.backend for rule in rules(op) if elements <= rule.most)
    return (best,) if op not in TABLE else (best, "cuda" if best == "triton" else "triton")
