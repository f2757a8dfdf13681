"""Proof that a compressed run is right: the full-length run with the dropped tokens masked agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Adapter
from cacovid_kernels.integrations.transformers.prompt import Prompt, all_tokens
from cacovid_kernels.integrations.transformers.prune import Compacted, arguments, compact

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
def compare(
    network: Any,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    prompt: Prompt,
    indices: Tensor,
    generated: Tensor,
    step_logits: Tensor,
) -> Agreement:
    """Compare a compressed run with the full-length run in which nobody sees a dropped token.

    Args:
        network: a Video-LLM of Hugging Face.
        adapter: of its family.
        inputs: what its processor returned.
        prompt: one prompt of one video, at full length.
        indices: `[K]` int64, the kept ones of its video tokens.
        generated: `[G]` int64 tokens that the compressed run generated.
        step_logits: `[G, V]` logits of each of these steps.

    Returns:
        The differences and what is allowed: 1e-5 of the largest logit in float32 (1e-5 at least), two
        roundings per layer in a lower precision.
    """
    # The last token is generated from the one before it and never read.
    said = generated[:-1]
    length = prompt.input_ids.shape[1]
    prompt = _continued(prompt, network.get_input_embeddings()(said[None]), said[None])
    keep = torch.ones(length + len(said), dtype=torch.bool, device=said.device)
    keep[prompt.tokens] = False
    keep[prompt.tokens[indices]] = True

    whole, _ = compact(prompt, *all_tokens(prompt))
    short, _ = compact(prompt, indices, (len(indices),))
    masked = _hidden(network, adapter, inputs, replace(whole, attention_mask=keep[None].long()))[keep]
    numbers = torch.arange(short.input_ids.shape[1], device=keep.device).expand_as(short.position_ids)
    kept_alone = _hidden(network, adapter, inputs, short)
    renumbered = _hidden(network, adapter, inputs, replace(short, position_ids=numbers))

    head = network.get_output_embeddings()
    before, steps = masked.shape[0] - len(said), len(generated)
    kept = wrong = scale = 0.0
    for a, b, c in zip(*(h.split(ROWS_PER_PASS) for h in (masked, kept_alone, renumbered)), strict=True):
        oracle = head(a).float()
        scale = max(scale, oracle.abs().max().item())
        kept = max(kept, (oracle - head(b).float()).abs().max().item())
        wrong = max(wrong, (oracle - head(c).float()).abs().max().item())
    decoded = head(masked[before - 1 : before - 1 + steps]).float()
    difference = (decoded - step_logits.float()).abs().max().item()
    layers = network.config.get_text_config().num_hidden_layers
    dtype = prompt.inputs_embeds.dtype
    precision = 1e-5 if dtype == torch.float32 else 2 * layers * torch.finfo(dtype).eps
    return Agreement(kept, difference, scale, wrong, precision * max(1.0, scale))


def _continued(prompt: Prompt, embeds: Tensor, ids: Tensor) -> Prompt:
    """A prompt with text behind it."""
    more = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, ids], 1),
        attention_mask=torch.cat([prompt.attention_mask, torch.ones_like(ids)], 1),
        inputs_embeds=torch.cat([prompt.inputs_embeds, embeds], 1),
        position_ids=torch.cat([prompt.position_ids, prompt.position_ids[..., -1:] + more], -1),
        lengths=(prompt.lengths[0] + ids.shape[1],),
    )


def _hidden(network: Any, adapter: Adapter, inputs: Mapping[str, Any], prompt: Compacted) -> Tensor:
    """`[L, D]` outputs of the last layer, without a cache."""
    given = arguments(network, adapter, inputs, prompt)
    return network.model(**given, use_cache=False).last_hidden_state[0]
