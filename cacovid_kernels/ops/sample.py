"""Drawing without replacement by Gumbel top-k, and the probability of an ordered draw."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cacovid_kernels._library import NAMESPACE, Op, library, refuse_tangents
from cacovid_kernels.ops._checks import check_choice, check_same_device, check_scores, describe
from cacovid_kernels.ops._draws import as_int, check_key, check_samples
from cacovid_kernels.selection import raise_if_flagged


class GumbelSample(NamedTuple):
    """Draws without replacement.

    Attributes:
        indices: `[S, ..., k]` int64 (`[..., k]` for a single draw), in the order in which they were drawn; -1
            where fewer than k items have a probability above zero.
        log_prob: `[S, ...]`, ln of the probability of each ordered draw.
        status: `[...]` int32, bits of `Status` per row of logits.
    """

    indices: Tensor
    log_prob: Tensor
    status: Tensor

    @property
    def n_valid(self) -> Tensor:
        """`[S, ...]` int64: how many items each draw holds, k unless the row is short."""
        return (self.indices >= 0).sum(-1)


def _fake_topk(logits, k, num_samples, *_):
    rows = logits.shape[0]
    indices = logits.new_empty(num_samples, rows, k, dtype=torch.int64)
    log_prob = logits.new_empty(num_samples, rows, dtype=torch.float32)
    return indices, log_prob, logits.new_empty(rows, dtype=torch.int32)


def _fake_log_prob(logits, indices):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(indices.shape[:2], dtype=dtype)


_gumbel_topk = Op(
    "sample",
    "gumbel_topk(Tensor logits, SymInt k, SymInt num_samples, SymInt seed, SymInt step, Tensor? added_steps, "
    "SymInt stream) -> (Tensor, Tensor, Tensor)",
    _fake_topk,
)
_pl_log_prob = Op("sample", "pl_log_prob(Tensor logits, Tensor indices) -> Tensor", _fake_log_prob)
_pl_log_prob_backward = Op(
    "sample",
    "pl_log_prob_backward(Tensor grad, Tensor logits, Tensor indices) -> Tensor",
    lambda grad, logits, indices: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
_pl_log_prob_double_backward = Op(
    "sample",
    "pl_log_prob_double_backward(Tensor direction, Tensor grad, Tensor logits, Tensor indices) -> (Tensor, Tensor)",
    lambda direction, grad, logits, indices: (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        torch.empty_like(logits, memory_format=torch.contiguous_format),
    ),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    logits, indices = ctx.saved_tensors
    return _pl_log_prob_backward(grad, logits, indices), None


def _double_backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor, None]:
    grad, logits, indices = ctx.saved_tensors
    return (*_pl_log_prob_double_backward(direction, grad, logits, indices), None)


torch.library.register_autograd(f"{NAMESPACE}::pl_log_prob", _backward, setup_context=_save, lib=library)
torch.library.register_autograd(
    f"{NAMESPACE}::pl_log_prob_backward", _double_backward, setup_context=_save, lib=library
)


def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    num_samples: int | None = None,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    check: str = "flag",
) -> GumbelSample:
    """Draws k items of every row without replacement, each time with probability softmax of what is left.

    The k largest of logits + Gumbel noise are such a draw (Plackett-Luce), all at once. The noise of an item
    is a function of seed, step, stream, sample, row and column alone, so a row draws the same items whatever
    `num_samples`, its batch-mates, the threads or the backend, and a smaller k draws the first of them.

    Args:
        logits: `[..., N]`; float32, bfloat16 or float16. -inf and NaN have probability zero; +inf is
            drawn before every finite logit, the lower index first. Rows are numbered over the leading
            dimensions.
        k: items per draw, in [0, N].
        num_samples: independent draws per row, at most 2^24; None for one draw without that dimension.
        seed: 64 bits, any integer in [-2^63, 2^64); -1 and 2^64 - 1 are the same seed.
        step: number of the training step, in [0, 2^32); or one int64 on the device of the logits, which is read
            there (modulo 2^32): a captured CUDA graph draws afresh when it has changed.
        stream: separates the uses of one seed, in [0, 240).
        check: "flag" records odd values in `GumbelSample.status`; "raise" makes NaN, +inf and rows with fewer
            than k candidates an error, at the price of a synchronisation on a GPU.

    Returns:
        A `GumbelSample` (indices, log_prob, status). The indices carry no gradient; `log_prob` is that of
        `pl_log_prob` and carries one if the logits do.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> draw = ck.gumbel_topk(torch.tensor([2.0, 0.0, -1.0, float("-inf")]), 2, num_samples=3, seed=7)
        >>> draw.indices.shape, bool((draw.indices < 3).all())
        (torch.Size([3, 2]), True)

    Source: Kool et al., "Stochastic beams and where to find them" (ICML 2019), section 2; the published
    CaCoVID code draws the same distribution with `torch.multinomial(replacement=False)`.
    """
    op = "gumbel_topk"
    check_scores(op, "logits", logits)
    check_choice(op, "check", check, ("flag", "raise"))
    if logits.dim() < 1:
        raise ValueError(f"{op}: logits must be [..., N] (logits: {describe(logits)}). Add a dimension.")
    k = as_int(op, "k", k)
    if not 0 <= k <= logits.shape[-1]:
        raise ValueError(f"{op}: k={k} must be in [0, N={logits.shape[-1]}] (logits: {describe(logits)}). Lower k.")
    samples = 1 if num_samples is None else check_samples(op, "num_samples", num_samples, 0)
    seed, step, added_steps, stream = check_key(op, seed, step, logits.device, stream)
    lead = logits.shape[:-1]
    rows = logits if logits.dim() == 2 else logits.reshape(lead.numel(), logits.shape[-1])
    indices, log_prob, status = _gumbel_topk(rows.detach(), k, samples, seed, step, added_steps, stream)
    if logits.requires_grad and torch.is_grad_enabled():
        log_prob = _pl_log_prob(rows, indices)
    if check == "raise":
        raise_if_flagged(op, status, "row")
    shape = lead if num_samples is None else (samples, *lead)
    return GumbelSample(indices.reshape(*shape, k), log_prob.reshape(shape), status.reshape(lead))


def pl_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probability of drawing given items in their order, without replacement (Plackett-Luce).

    The weight still in the race is summed from the last stage to the first, so nothing is ever subtracted and
    no digits cancel, however small the part that was not drawn.

    Args:
        logits: `[..., N]`; float64, float32, bfloat16 or float16. -inf and NaN have probability zero.
        indices: `[..., k]` or `[S, ..., k]`, int64 or int32, in drawing order; -1 is padding and ignored.

    Returns:
        `[...]` or `[S, ...]`, float64 for float64 logits, else float32: 0 for an empty draw, -inf for an
        impossible one (a repeated item, a logit of -inf), NaN for an index outside [-1, N) or a drawn NaN.
        Twice differentiable in the logits, with gradient 0 where it is not finite.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> ck.pl_log_prob(torch.zeros(4), torch.tensor([2, 0])).exp()  # 1/4 * 1/3
        tensor(0.0833)

    Source: Plackett, "The analysis of permutations" (1975).
    """
    op = "pl_log_prob"
    if not (isinstance(logits, Tensor) and logits.dtype == torch.float64 and logits.layout is torch.strided):
        check_scores(op, "logits", logits)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        found = describe(indices) if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{op}: indices must be int64 or int32 (indices: {found}). Call .long() on it.")
    check_same_device(op, "indices", indices, "logits", logits)
    lead = logits.shape[:-1]
    single = indices.dim() == logits.dim()
    if logits.dim() < 1 or (not single and indices.dim() != logits.dim() + 1):
        raise ValueError(
            f"{op}: indices must have the dimensions of logits, or one more in front "
            f"(logits: {describe(logits)}; indices: {describe(indices)})."
        )
    if indices.shape[-1 - len(lead) : -1] != lead:
        raise ValueError(
            f"{op}: indices must have the rows of logits, {list(lead)} "
            f"(logits: {describe(logits)}; indices: {describe(indices)})."
        )
    refuse_tangents(op, [logits])
    samples = 1 if single else indices.shape[0]
    rows = logits if logits.dim() == 2 else logits.reshape(lead.numel(), logits.shape[-1])
    drawn = indices.long().reshape(samples, lead.numel(), indices.shape[-1])
    return _pl_log_prob(rows, drawn).reshape(indices.shape[:-1])
