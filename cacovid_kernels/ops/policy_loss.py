"""The loss of a policy over sampled combinations, and the sums that the steps on one batch share."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels._library import NAMESPACE, Op, library, needs_dispatcher, refuse_tangents
from cacovid_kernels.ops._checks import SCORE_TYPES, check_choice, check_same_device, describe
from cacovid_kernels.ops._draws import as_int
from cacovid_kernels.ops._packed_masks import INTEGERS, check_tensor, pack_masks, words_of
from cacovid_kernels.ops.sample import pl_log_prob

_OP = "combination_policy_loss"
_FLOATS = (*SCORE_TYPES, torch.float64)


def _fake_sums(words, rewards, num_tokens, balanced):
    return words.new_empty(rewards.shape[0], 6, num_tokens, dtype=torch.float64)


def _fake_loss(logits, *_):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape, dtype=dtype)


# words [B, G, W] int32, rewards [B, G] -> [B, 6, N] float64 (CombinationSums).
_policy_sums = Op(
    "policy_loss",
    "policy_sums(Tensor words, Tensor rewards, SymInt num_tokens, bool balanced) -> Tensor",
    _fake_sums,
)
# logits and old_logits [B, N] or [B, N, 2] -> the loss, and its gradient by logits in float32 (float64).
_policy_loss = Op(
    "policy_loss",
    "policy_loss(Tensor logits, Tensor old_logits, Tensor sums, float eps_low, float eps_high, float kl_weight) "
    "-> (Tensor, Tensor)",
    _fake_loss,
)
# The same without sums that a further step could read: policy_loss of policy_sums.
_policy_loss_once = Op(
    "policy_loss",
    "policy_loss_once(Tensor logits, Tensor old_logits, Tensor words, Tensor rewards, bool balanced, float eps_low, "
    "float eps_high, float kl_weight) -> (Tensor, Tensor)",
    _fake_loss,
)
_policy_loss_backward = Op(
    "policy_loss",
    "policy_loss_backward(Tensor grad, Tensor gradient, Tensor logits) -> Tensor",
    lambda grad, gradient, logits: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    gradient, logits = ctx.saved_tensors
    found = None if grad is None else _policy_loss_backward(grad, gradient.detach(), logits)
    return found, *[None] * (len(ctx.needs_input_grad) - 1)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(f"{_OP}: it has no second derivative. Call backward without create_graph=True.")


for _op in (_policy_loss, _policy_loss_once):
    torch.library.register_autograd(f"{NAMESPACE}::{_op.name}", _backward, setup_context=_save, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::policy_loss_backward", _no_second_derivative, lib=library)


class _EagerLoss(torch.autograd.Function):
    """The loss alone, where only autograd has to see the op: a third of the time that its dispatcher takes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, op: Op, lead: int, args: tuple[Any, ...]) -> Tensor:
        loss, gradient = op.run(_batch(logits, lead), *args)
        ctx.save_for_backward(gradient.view(logits.shape), logits)
        ctx.set_materialize_grads(False)
        return loss

    backward = staticmethod(_backward)


def _batch(x: Tensor, lead: int) -> Tensor:
    return x if lead else x.unsqueeze(0)


def _loss_of(op: Op, lead: int, logits: Tensor, *args: Any) -> Tensor:
    """The loss by an op for a batch of videos, or for one (`lead` 0) whose logits have no such dimension."""
    if torch.is_grad_enabled() and logits.requires_grad and not needs_dispatcher((logits, *args), autograd=False):
        return _EagerLoss.apply(logits, op, lead, args)
    return op(_batch(logits, lead), *args)[0]


@dataclass(frozen=True, eq=False)
class CombinationSums:
    """What the policy loss needs of a batch of combinations: with two actions, six sums per token.

    They stay the same while the policy is optimised on one batch: a step then looks once at each token, however many
    combinations there are.

    Attributes:
        values: `[6, N]` or `[B, 6, N]` float64. Over the combinations that keep a token: the weighted advantages above
            zero (row 0) and all others (row 1), and the weights (row 4). Rows 2, 3 and 5: those that drop it.

    Source: the published trainer's loss, regrouped.
    """

    values: Tensor

    def loss(
        self,
        token_logits: Tensor,
        old_logits: Tensor,
        *,
        eps_low: float = 0.2,
        eps_high: float = 0.28,
        kl_weight: float = 0.0,
    ) -> Tensor:
        """The loss of a policy on this batch; arguments and result of `combination_policy_loss`.

        Example:
            >>> import torch, cacovid_kernels as ck
            >>> sums = ck.combination_sums(torch.tensor([[1, 0], [0, 1]]), torch.tensor([1.0, 0.0]))
            >>> logits = torch.zeros(2, requires_grad=True)
            >>> sums.loss(logits, torch.zeros(2)).backward()
            >>> logits.grad
            tensor([-0.1768,  0.1768])
        """
        rule = _check_rule(eps_low, eps_high, kl_weight)
        _check_logits(token_logits, old_logits)
        lead = self.values.dim() - 2
        _check_shapes(token_logits, old_logits, self.values.shape[:lead], self.values.shape[-1], self.values)
        args = (_batch(old_logits.detach(), lead), _batch(self.values, lead), *rule)
        return _loss_of(_policy_loss, lead, token_logits, *args)


def _check_rule(eps_low: float, eps_high: float, kl_weight: float) -> tuple[float, float, float]:
    for name, value, most in (("eps_low", eps_low, 1.0), ("eps_high", eps_high, 1e6), ("kl_weight", kl_weight, 1e6)):
        if not isinstance(value, Real) or not 0.0 <= value <= most:
            raise ValueError(f"{_OP}: {name}={value} must be a number in [0, {most:g}].")
    return float(eps_low), float(eps_high), float(kl_weight)


def _check_logits(token_logits: Tensor, old_logits: Tensor) -> None:
    check_tensor(_OP, "token_logits", token_logits, _FLOATS, "float32, bfloat16, float16 or float64")
    check_tensor(_OP, "old_logits", old_logits, _FLOATS, "float32, bfloat16, float16 or float64")
    refuse_tangents(_OP, [token_logits])


def _check_shapes(token_logits: Tensor, old_logits: Tensor, lead: torch.Size, n: int, masks: Tensor) -> None:
    """Logits of both policies for `n` tokens of `lead` videos, on the device of the masks, or ValueError."""
    for name, x in (("token_logits", token_logits), ("old_logits", old_logits)):
        if x.shape != (*lead, n) and x.shape != (*lead, n, 2):
            raise ValueError(
                f"{_OP}: {name} must be {[*lead, n]} or {[*lead, n, 2]} for combinations of {n} tokens "
                f"({name}: {describe(x)})."
            )
        check_same_device(_OP, name, x, "the masks", masks)


def combination_sums(
    masks: Tensor, rewards: Tensor, *, num_tokens: int | None = None, balanced: bool = True
) -> CombinationSums:
    """Reads a batch of combinations and their rewards once, for any number of steps of `CombinationSums.loss`.

    Args:
        masks: `[G, N]` or, for B videos, `[B, G, N]` bool or integers; what is not 0 is kept. With `num_tokens`, the
            int32 words `[..., G, ceil(N / 32)]` of `pack_masks`, which are not packed again.
        rewards: `[G]` or `[B, G]`, any real numbers, on the device of the masks.
        num_tokens: N, for masks that are packed.
        balanced: whether kept and dropped tokens of a combination have the same weight in total: the published loss of
            tokens. False weighs all alike: the published loss of frames.

    Returns:
        A `CombinationSums`. NaN rewards make the loss NaN.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> masks, rewards = torch.rand(4, 100) < 0.1, torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> ck.combination_sums(ck.pack_masks(masks), rewards, num_tokens=100).values.shape
        torch.Size([6, 100])
    """
    words, rewards, n = _read(masks, rewards, num_tokens)
    if words.dim() == 3:
        return CombinationSums(_policy_sums(words, rewards, n, balanced))
    return CombinationSums(_policy_sums(words.unsqueeze(0), rewards.unsqueeze(0), n, balanced)[0])


def _read(masks: Tensor, rewards: Tensor, num_tokens: int | None) -> tuple[Tensor, Tensor, int]:
    """Checked arguments of `combination_sums` as words, rewards of a float type, and the number of tokens."""
    check_tensor(_OP, "masks", masks, INTEGERS, "bool or integers")
    check_tensor(_OP, "rewards", rewards, (*_FLOATS, *INTEGERS), "real numbers")
    if masks.dim() not in (2, 3) or rewards.shape != masks.shape[:-1]:
        raise ValueError(
            f"{_OP}: masks must be [G, N] or [B, G, N] with one reward each "
            f"(masks: {describe(masks)}; rewards: {describe(rewards)})."
        )
    n = masks.shape[-1] if num_tokens is None else as_int(_OP, "num_tokens", num_tokens)
    if num_tokens is not None and (masks.dtype != torch.int32 or masks.shape[-1] != words_of(n)):
        raise ValueError(
            f"{_OP}: packed masks of num_tokens={n} must be [..., {words_of(n)}] int32 (masks: {describe(masks)}). "
            f"Leave num_tokens out for masks that are not packed."
        )
    if n < 1 or rewards.numel() < 1:
        raise ValueError(f"{_OP}: there must be tokens and combinations (masks: {describe(masks)}).")
    check_same_device(_OP, "rewards", rewards, "masks", masks)
    words = pack_masks(masks) if num_tokens is None else masks
    return words, rewards.detach() if rewards.is_floating_point() else rewards.double(), n


def combination_policy_loss(
    token_logits: Tensor,
    old_logits: Tensor,
    masks: Tensor,
    rewards: Tensor,
    *,
    balanced: bool = True,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    kl_weight: float = 0.0,
    likelihood: str = "actions",
) -> Tensor:
    """The clipped policy loss of a group of combinations, each rewarded as a whole.

    A combination's advantage is its reward minus the group's mean, over the sample standard deviation + 1e-4 (0 in a
    group of one). Per token, the ratio of the new to the old probability of what the combination did with it, keep or
    drop, multiplies the advantage, and earns nothing more beyond [1 - eps_low, 1 + eps_high]. Plus `kl_weight` times
    the KL to a fair coin by the estimator e^d - d - 1.

    Loss and gradient need the combinations only through six sums per token. For several steps on one batch, compute
    them once: `sums = combination_sums(masks, rewards)`, then `sums.loss(token_logits, old_logits)` in every step.

    Args:
        token_logits: `[N, 2]` logits of drop and keep, or `[N]` their difference (keep minus drop, as `score_tokens`
            gives it); float32, bfloat16, float16 or float64. With a batch of B videos `[B, N, 2]` or `[B, N]`.
        old_logits: the same of the policy that drew the combinations; constants.
        masks: `[G, N]` or `[B, G, N]` bool or integers, what is not 0 is kept; or int32 words of `pack_masks`.
        rewards: `[G]` or `[B, G]`; constants.
        balanced: whether kept and dropped tokens of a combination have the same weight in total: the published loss of
            tokens. False weighs all alike: the published loss of frames, whose arguments are frame logits and masks.
        eps_low, eps_high: how far a ratio pays, below 1 (in [0, 1]) and above.
        kl_weight: weight of the KL, at least 0.
        likelihood: "actions" as above; "plackett_luce" for ordered draws without replacement: `masks` are the int64
            indices `[G, K]` of draws from logits `[N]` (-1 is padding), or `[G, R, K]` from each of R rows of logits
            `[R, N]`. The ratio is then that of the exact probability of a whole draw (`pl_log_prob`), `balanced` has no
            meaning and `kl_weight` must be 0.

    Returns:
        The loss, a scalar, the mean over B; float64 for float64 logits, else float32. Its gradient reaches
        `token_logits` alone, in their dtype. It is computed together with the loss: there is no second derivative
        (but for "plackett_luce"). NaN among logits or rewards makes the loss NaN.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.
        RuntimeError: on a second derivative.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> logits = torch.zeros(4, requires_grad=True)
        >>> masks = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
        >>> loss = ck.combination_policy_loss(logits, logits, masks, torch.tensor([1.0, 0.0]))
        >>> loss.backward()  # what the better combination kept becomes likelier
        >>> logits.grad
        tensor([-0.0884, -0.0884,  0.0884,  0.0884])

    Source: CaCoVID (arXiv 2602.01649), the published trainer's `compute_loss`.
    """
    check_choice(_OP, "likelihood", likelihood, ("actions", "plackett_luce"))
    if likelihood == "plackett_luce":
        return _ordered_loss(token_logits, old_logits, masks, rewards, eps_low, eps_high, kl_weight)
    rule = _check_rule(eps_low, eps_high, kl_weight)
    _check_logits(token_logits, old_logits)
    check_tensor(_OP, "masks", masks, INTEGERS, "bool or integers")
    axis = masks.dim() - 2  # of the tokens in logits
    n = token_logits.shape[axis] if 0 <= axis < token_logits.dim() else 0
    packed = masks.dtype == torch.int32 and masks.shape[-1:] == (words_of(n),)
    words, rewards, n = _read(masks, rewards, n if packed else None)
    lead = words.dim() - 2
    _check_shapes(token_logits, old_logits, words.shape[:lead], n, words)
    args = (_batch(old_logits.detach(), lead), _batch(words, lead), _batch(rewards, lead), balanced, *rule)
    return _loss_of(_policy_loss_once, lead, token_logits, *args)


def _ordered_loss(
    logits: Tensor, old_logits: Tensor, indices: Tensor, rewards: Tensor, eps_low: float, eps_high: float, kl: float
) -> Tensor:
    low, high, kl = _check_rule(eps_low, eps_high, kl)
    _check_logits(logits, old_logits)
    check_tensor(_OP, "masks", indices, (torch.int64,), 'int64 indices with likelihood="plackett_luce"')
    check_tensor(_OP, "rewards", rewards, (*_FLOATS, *INTEGERS), "real numbers")
    if kl != 0.0:
        raise ValueError(
            f'{_OP}: kl_weight={kl} must be 0 with likelihood="plackett_luce". Ordered draws have no prior.'
        )
    if logits.dim() not in (1, 2) or indices.dim() != logits.dim() + 1 or old_logits.shape != logits.shape:
        raise ValueError(
            f"{_OP}: ordered draws [G, K] need logits [N], draws [G, R, K] logits [R, N] "
            f"(masks: {describe(indices)}; token_logits: {describe(logits)}; old_logits: {describe(old_logits)})."
        )
    if rewards.shape != indices.shape[:1] or rewards.numel() < 1:
        raise ValueError(f"{_OP}: there must be one reward for each draw (rewards: {describe(rewards)}).")
    check_same_device(_OP, "rewards", rewards, "token_logits", logits)
    log_prob = pl_log_prob(logits, indices)  # [G] or [G, R]
    ratio = (log_prob - pl_log_prob(old_logits.detach(), indices)).exp()
    wide = rewards.detach().to(ratio.dtype)
    deviation = wide.std() if wide.numel() > 1 else 0.0
    advantage = ((wide - wide.mean()) / (deviation + 1e-4)).view(-1, *[1] * (ratio.dim() - 1))
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).mean()
