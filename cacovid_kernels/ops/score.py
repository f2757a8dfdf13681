"""Policy scores: RMSNorm, a five-layer head, the difference of its two logits; for tokens and for frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cacovid_kernels._library import Op
from cacovid_kernels.ops._checks import check_same_device, check_scores, check_tensor, describe, parse_grid
from cacovid_kernels.reference import score as reference

INITIALIZER_RANGE = 0.02  # standard deviation of fresh weights, as in the language models


class FoldedHead(NamedTuple):
    """A `PolicyHead` for inference: rows `[N, D]`, and 1 / rms where still to be applied -> scores `[N]`."""

    weights: tuple[Tensor, ...]  # four, the first times the norm's weight
    biases: tuple[Tensor, ...]
    vector: Tensor  # [D / 16] float32, the fifth layer's second row minus its first
    offset: Tensor  # [] float32, the same of its bias

    def __call__(self, rows: Tensor, rrms: Tensor | None = None) -> Tensor:
        tensors = (rows, *self.weights, *self.biases, self.vector)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise RuntimeError("FoldedHead: has no gradient, but a tensor requires one. Call it under torch.no_grad().")
        weights, biases = list(self.weights), list(self.biases)
        kind = rows.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # no op of a graph sees it
            dtype = torch.get_autocast_dtype(kind)
            rows = rows.to(dtype)
            weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
        return _head_scores(rows, rrms, weights, biases, self.vector, self.offset)


class PolicyHead(nn.Sequential):
    """Five linear layers D -> D/2 -> D/4 -> D/8 -> D/16 -> outputs with SiLU between them.

    Args:
        size: D, at least 16.
        outputs: logits per row; two for a score.

    Source: CaCoVID's published `token_compress`, `frame_compress` and `mode_selection`, whose parameter names
    this module keeps.
    """

    def __init__(self, size: int, outputs: int = 2) -> None:
        if size < 16:
            raise ValueError(f"PolicyHead: size={size} must be >= 16, the head narrows to size / 16.")
        widths = [size, size // 2, size // 4, size // 8, size // 16, outputs]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths[1:], widths[:-1], strict=True):
            layers += [nn.Linear(wide, narrow), nn.SiLU()]
        super().__init__(*layers[:-1])
        self.apply(_initialise)

    @property
    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    def folded(self, norm_weight: Tensor | None = None) -> FoldedHead:
        """The head with `norm_weight` `[D]` multiplied into its first matrix, its last layer made one vector.

        Made anew on every call: it costs less than one percent of the products it saves a pass of, and a
        cache would have to notice every way in which parameters change.
        """
        *hidden, last = self.linears
        if last.out_features != 2:
            raise ValueError(f"PolicyHead.folded: outputs={last.out_features} must be 2, to have a difference.")
        first = hidden[0].weight if norm_weight is None else hidden[0].weight * norm_weight
        return FoldedHead(
            (first, *(layer.weight for layer in hidden[1:])),
            tuple(layer.bias for layer in hidden),
            last.weight[1].float() - last.weight[0].float(),
            last.bias[1].float() - last.bias[0].float(),
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
        nn.init.zeros_(module.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight along the last axis, in float32 but for the last product."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def check_dtype(op: str, name: str, x: Tensor, weights: torch.dtype) -> None:
    """`x` has the dtype of the weights it meets, unless autocast takes care of that, or TypeError."""
    if x.dtype != weights and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{op}: {name} must be {weights} like the weights ({name}: {describe(x)}). Convert one of them."
        )


def _fake_frame_pool(hidden, grid_thw, eps):
    rrms = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return rrms, hidden.new_empty(sum(grid_thw[::3]), hidden.shape[1], dtype=torch.float32)


# hidden [N, D] -> 1 / rms of every row [N] and the mean row of every frame [F, D], both float32, in one read.
_frame_pool = Op(
    "score", "frame_pool(Tensor hidden, SymInt[] grid_thw, float eps) -> (Tensor, Tensor)", _fake_frame_pool
)


def _fake_head_scores(rows, rrms, weights, biases, vector, offset):
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


# Rows [N, D], their factors [N] if still to be applied, and a FoldedHead -> scores [N] float32.
_head_scores = Op(
    "score",
    "head_scores(Tensor rows, Tensor? rrms, Tensor[] weights, Tensor[] biases, Tensor vector, Tensor offset) -> Tensor",
    _fake_head_scores,
)


def score_tokens(
    hidden: Tensor,
    token_head: PolicyHead,
    frame_head: PolicyHead | None = None,
    grid_thw: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    norm_weight: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Scores every video token and, with a frame head, the mean of every frame.

    A score is the second logit of head(RMSNorm(row)) minus the first. Without gradients the norm's weight is
    folded into the head's first matrix, the last layer into one vector, and row statistics and frame means
    come from one read of `hidden`. With gradients the unfolded modules run, and autograd reaches every input.

    Args:
        hidden: `[N, D]` hidden states of the video tokens, packed over all videos, or `[T, P, D]` or
            `[B, T, P, D]`; float32, bfloat16 or float16, the dtype of the heads.
        token_head: head of the tokens, with two outputs.
        frame_head: head of the frames; without one no frames are scored.
        grid_thw: (frames, rows, columns) per video, on the host; needed to score the frames of packed tokens.
        norm_weight: `[D]`, weight of the RMSNorm that both heads share.
        eps: added to the mean square.

    Returns:
        Token scores `[N]` and frame scores `[F]` (None without a frame head), float32.

    Raises:
        ValueError, TypeError: an argument breaks its rule; one line says which.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> head, frame_head = ck.PolicyHead(32), ck.PolicyHead(32)
        >>> hidden, weight = torch.randn(2, 9, 32), torch.ones(32)
        >>> with torch.no_grad():
        ...     tokens, frames = ck.score_tokens(hidden, head, frame_head, norm_weight=weight)
        >>> tokens.shape, frames.shape
        (torch.Size([18]), torch.Size([2]))

    Source: CaCoVID (arXiv 2602.01649) section 3, published `CompressionPolicy.forward`.
    """
    op = "score_tokens"
    check_scores(op, "hidden", hidden)
    first = token_head.linears[0].weight
    size = first.shape[1]
    check_tensor(op, "norm_weight", norm_weight, "[D]")
    if not 2 <= hidden.dim() <= 4 or hidden.shape[-1] != size or norm_weight.shape != (size,):
        raise ValueError(
            f"{op}: hidden must be [N, D={size}], [T, P, D] or [B, T, P, D] and norm_weight [D] "
            f"(hidden: {describe(hidden)}, norm_weight: {list(norm_weight.shape)}). Pass this model's head."
        )
    check_same_device(op, "norm_weight", norm_weight, "hidden", hidden)
    check_same_device(op, "token_head", first, "hidden", hidden)
    check_dtype(op, "hidden", hidden, first.dtype)
    rows = hidden.flatten(0, -2)
    flat: list[int] | None = None
    if frame_head is not None:
        grid = parse_grid(op, grid_thw, hidden[..., 0])
        flat = [n for video in grid for n in video]
        tokens = sum(t * h * w for t, h, w in grid)
        if rows.shape[0] != tokens:
            raise ValueError(
                f"{op}: hidden must hold one row for each of the {tokens} tokens of grid_thw={list(grid)} "
                f"(hidden: {describe(hidden)}). Pass the grid of these tokens."
            )
    gradient = torch.is_grad_enabled() and _any_gradient(rows, norm_weight, token_head, frame_head)
    return (_score if gradient else _folded)(rows, token_head, frame_head, flat, norm_weight, eps)


def _any_gradient(rows: Tensor, norm_weight: Tensor, *heads: PolicyHead | None) -> bool:
    parameters = (p for head in heads if head is not None for p in head.parameters())
    return rows.requires_grad or norm_weight.requires_grad or any(p.requires_grad for p in parameters)


def _score(rows, token_head, frame_head, grid_thw, norm_weight, eps):
    def difference(head: PolicyHead, x: Tensor) -> Tensor:
        logits = head(rms_norm(x, norm_weight, eps)).float()
        return logits[:, 1] - logits[:, 0]

    tokens = difference(token_head, rows)
    if frame_head is None:
        return tokens, None
    _, means = reference.frame_pool(rows, grid_thw, eps)
    return tokens, difference(frame_head, means.to(rows.dtype))


def _folded(rows, token_head, frame_head, grid_thw, norm_weight, eps):
    frames = None
    if frame_head is None:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        rrms = torch.rsqrt(norms.square() / rows.shape[1] + eps)
    else:
        rrms, means = _frame_pool(rows.detach(), grid_thw, eps)
        # So few rows that weighting them is cheaper than weighting the head's first matrix.
        frames = frame_head.folded()(rms_norm(means, norm_weight.float(), eps).to(rows.dtype))
    return token_head.folded(norm_weight)(rows, rrms), frames
