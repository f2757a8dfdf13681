"""From samples to the frozen model's answers: embed once, show every combination in one batched forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels._masks import masked_positions
from cacovid_kernels.errors import UserError, first_line
from cacovid_kernels.integrations.transformers.adapter import Adapter
from cacovid_kernels.integrations.transformers.prompt import read
from cacovid_kernels.integrations.transformers.prune import Flat, flat, take
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.samples import BadRowError, Sample
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.rewards import Attempts
from cacovid_kernels.video_models import VideoModel


class Prompt(NamedTuple):
    """A sample as the language model reads it, and the right answer behind it."""

    sample: Sample
    tokens: Flat  # [L + A - 1]: the prompt, then the right answer but for its last token
    encoded: dict[str, Any]  # outputs of the vision tower
    video: Tensor  # [N] int64 positions of the video tokens
    text: Tensor  # [L - N] int64 positions of the rest of the prompt
    answer: Tensor  # [A] int64 token ids
    grid: tuple[int, int, int]

    @property
    def length(self) -> int:
        return len(self.video) + len(self.text)

    @property
    def features(self) -> Tensor:
        """`[N, D]` of the video tokens."""
        return self.tokens.inputs_embeds[self.video]


@torch.no_grad()
def encode(model: VideoModel, sample: Sample, config: TrainConfig) -> Prompt:
    """Vision tower and embeddings of one sample.

    Raises:
        BadRowError: the question or the answer cannot be written in the model's tokens, or the processor or the
            model's family refuses the prompt.
    """
    adapter = adapter_of(model.network)
    with _refusing(sample):
        inputs = model.inputs(sample.frames, sample.question, sample.timestamps)
    answer = model.tokenizer(sample.answer + config.answer_end, add_special_tokens=False)["input_ids"]
    if not answer:
        raise BadRowError(f"{sample.name}: answer {sample.answer!r} has no token.")
    ids = inputs["input_ids"]
    placeholder = adapter.token_id(model.network, adapter.modality)
    if placeholder in answer:
        raise BadRowError(
            f"{sample.name}: answer {sample.answer!r} holds the model's placeholder of a video (token {placeholder}). "
            f"Take it out."
        )
    answer = torch.tensor(answer, device=ids.device)
    spoken, length = len(answer) - 1, ids.shape[1]
    inputs = {**inputs, "input_ids": torch.cat([ids, answer[None, :-1]], 1)}
    for name, of_text in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if inputs.get(name) is not None:
            inputs[name] = F.pad(inputs[name], (0, spoken), value=of_text)
    with _refusing(sample):
        whole = read(model.network, adapter, inputs)
    if len(whole.grid_thw) != 1:
        raise BadRowError(f"{sample.name}: the prompt holds {len(whole.grid_thw)} videos, a row must hold one.")
    is_text = torch.ones(length, dtype=torch.bool, device=ids.device).scatter(0, whole.tokens, False)
    text = masked_positions(is_text, length - len(whole.tokens))
    return Prompt(sample, flat(whole), whole.encoded, whole.tokens, text, answer, whole.grid_thw[0])


@contextmanager
def _refusing(sample: Sample) -> Iterator[None]:
    """Inside, what is refused of a sample is a bad row of one line."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise BadRowError(f"{sample.name}: {first_line(error)}") from None


def policy_batch(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Arguments of a `CompressionPolicy` for a batch of prompts, padded on the right."""
    longest = max(prompt.length for prompt in prompts)
    embeds, masks = [], []
    for prompt in prompts:
        padding = longest - prompt.length
        embeds.append(F.pad(prompt.tokens.inputs_embeds[: prompt.length].float(), (0, 0, 0, padding)))
        is_video = torch.zeros(longest, dtype=torch.bool, device=prompt.video.device)
        masks.append(is_video.scatter(0, prompt.video, True))
    batch: dict[str, Any] = {
        "inputs_embeds": torch.stack(embeds),
        "video_mask": torch.stack(masks),
        "grid_thw": [prompt.grid for prompt in prompts],
    }
    if any(prompt.length < longest for prompt in prompts):
        real = torch.tensor([[i < x.length for i in range(longest)] for x in prompts])
        batch["attention_mask"] = real.to(embeds[0].device)
    return batch


@torch.no_grad()
def attempt(
    model: VideoModel, prompts: Sequence[Prompt], kept: Sequence[Tensor], config: TrainConfig, *, speaks: bool
) -> list[Attempts]:
    """Let the frozen model answer every question from every combination of its video's tokens.

    Args:
        prompts: S samples.
        kept: `[G, K]` positions in the video per sample, -1 padding; K may differ from sample to sample.
        speaks: generate texts, instead of asking for the right answer's probabilities.
    """
    adapter = adapter_of(model.network)
    if adapter.embeddings_suffice:
        return _attempt(model, adapter, prompts, kept, config, speaks)
    return [
        found
        for prompt, chosen in zip(prompts, kept, strict=True)
        for found in _attempt(model, adapter, [prompt], [chosen], config, speaks)
    ]


def _attempt(
    model: VideoModel,
    adapter: Adapter,
    prompts: Sequence[Prompt],
    kept: Sequence[Tensor],
    config: TrainConfig,
    speaks: bool,
) -> list[Attempts]:
    """One forward, or one generation, for all combinations of all prompts."""
    inputs = _inputs(model, adapter, prompts, kept, speaks)
    sizes = [len(chosen) for chosen in kept]
    if speaks:
        output = model.network.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        starts = [sum(sizes[:s]) for s in range(len(sizes))]
        return [
            Attempts(prompt.sample, chosen, prompt.answer, None, texts[start : start + len(chosen)])
            for prompt, chosen, start in zip(prompts, kept, starts, strict=True)
        ]
    most = max(len(prompt.answer) for prompt in prompts)
    logits = model.network(**inputs, logits_to_keep=most, use_cache=False).logits
    logits = logits[:, -most:]  # [S * G, most, V]; VideoLLaMA3 gives all
    return [
        Attempts(prompt.sample, chosen, prompt.answer, rows[:, most - len(prompt.answer) :], None)
        for prompt, chosen, rows in zip(prompts, kept, logits.split(sizes), strict=True)
    ]


def _inputs(
    model: VideoModel, adapter: Adapter, prompts: Sequence[Prompt], kept: Sequence[Tensor], speaks: bool
) -> dict[str, Any]:
    """Arguments of the model for all combinations: a row each, gathered from one copy of all prompts."""
    rows, first = [], 0
    for prompt, chosen in zip(prompts, kept, strict=True):
        spoken = 0 if speaks else len(prompt.answer) - 1
        rest = torch.cat([prompt.text, torch.arange(prompt.length, prompt.length + spoken, device=chosen.device)])
        video = torch.where(chosen < 0, -1, prompt.video[chosen.clamp(min=0)])
        # -1, which sorts first, is padding on the left.
        index = torch.cat([video, rest.expand(len(chosen), -1)], 1).sort(1).values
        rows.append(torch.where(index < 0, -1, index + first))
        first += len(prompt.tokens.input_ids)
    longest = max(index.shape[1] for index in rows)
    index = torch.cat([F.pad(index, (longest - index.shape[1], 0), value=-1) for index in rows])  # [S * G, L']
    ids, embeds, positions, mask = zip(*(prompt.tokens for prompt in prompts), strict=True)
    tokens = Flat(torch.cat(ids), torch.cat(embeds), torch.cat(positions, -1), torch.cat(mask))
    if adapter.embeddings_suffice:
        compacted = take(tokens, index, index[:0, 0], (), {})
    else:
        chosen = kept[0].sort(1).values  # features lie in the order of the prompt, as its tokens do
        counts = tuple((chosen >= 0).sum(1).tolist())
        compacted = take(tokens, index, chosen[chosen >= 0], counts, prompts[0].encoded)
    return {
        **adapter.pack(model.network, compacted),
        "position_ids": compacted.position_ids,
        "attention_mask": compacted.attention_mask,
    }
