"""Proof that a compressed run is right: the full-length run with the dropped tokens masked agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS_PER_PASS = 512  # through the output projection: the logits of a whole prompt would take gigabytes


@dataclass(frozen=True)
class Agreement:
    """Largest absolute differences between the logits of two runs that must be the same."""

    kept_positions: float  # every prompt position that was kept
    generated: float  # every decoding step, as `generate` computed it with its cache
    largest_logit: float
    renumbered: float  # the same for positions 0, 1, 2, ...: shows that the comparison can fail
    tolerance: float

    @property
    def largest(self) -> float:
        return max(self.kept_positions, self.generated)

    @property
    def holds(self) -> bool:
        return self.largest <= self.tolerance


@torch.inference_mode()
def compare(network: Any, embeds: Tensor, keep: Tensor, generated: Tensor, step_logits: Tensor) -> Agreement:
    """Compare a compressed run with the full-length run in which nobody sees a dropped token.

    Args:
        network: a causal model of Hugging Face.
        embeds: `[1, L, D]` inputs of the full prompt.
        keep: `[L]` bool, the positions of the compressed prompt.
        generated: `[G]` int64 tokens that the compressed run generated.
        step_logits: `[G, V]` logits of each of these steps.

    Returns:
        The differences and what is allowed: 1e-5 of the largest logit in float32 (1e-5 at least), two
        roundings per layer in a lower precision.
    """
    # The last token is generated from the one before it and never read.
    read = generated[:-1]
    full = torch.cat([embeds, network.get_input_embeddings()(read)[None]], dim=1)
    keep = torch.cat([keep, keep.new_ones(read.numel())])
    positions = torch.arange(full.shape[1], device=full.device)[None]
    ones = keep.new_ones(1, int(keep.sum()), dtype=torch.int64)

    masked = _hidden(network, full, keep[None].long(), positions)[keep]
    short = _hidden(network, full[:, keep], ones, positions[:, keep])
    renumbered = _hidden(network, full[:, keep], ones, positions[:, : ones.shape[1]])

    head = network.get_output_embeddings()
    prompt, steps = masked.shape[0] - read.numel(), generated.numel()
    kept = wrong = scale = 0.0
    for a, b, c in zip(*(h.split(ROWS_PER_PASS) for h in (masked, short, renumbered)), strict=True):
        oracle = head(a).float()
        scale = max(scale, oracle.abs().max().item())
        kept = max(kept, (oracle - head(b).float()).abs().max().item())
        wrong = max(wrong, (oracle - head(c).float()).abs().max().item())
    decoded = head(masked[prompt - 1 : prompt - 1 + steps]).float()
    difference = (decoded - step_logits.float()).abs().max().item()
    layers = network.config.get_text_config().num_hidden_layers
    precision = 1e-5 if embeds.dtype == torch.float32 else 2 * layers * torch.finfo(embeds.dtype).eps
    return Agreement(kept, difference, scale, wrong, precision * max(1.0, scale))


def _hidden(network: Any, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """`[L, D]` outputs of the last layer, without a cache."""
    output = network.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[0]
