"""From samples to the frozen model's answers: embed once, show every combination in one batched forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels._masks import masked_positions
from cacovid_kernels.errors import UserError
from cacovid_kernels.ops.gather import gather_tokens
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.data import BadRowError, Sample
from cacovid_kernels.training.rewards import Attempts
from cacovid_kernels.video_model import VideoModel


class Prompt(NamedTuple):
    """A sample as the language model reads it, and the right answer behind it."""

    sample: Sample
    embeds: Tensor  # [L + A - 1, D]: the prompt, then the right answer but for its last token
    video_mask: Tensor  # [L] bool
    video: Tensor  # [N] int64 positions of the video tokens
    text: Tensor  # [L - N] int64 positions of the rest of the prompt
    answer: Tensor  # [A] int64 token ids
    grid: tuple[int, int, int]

    @property
    def length(self) -> int:
        return self.video_mask.shape[0]

    @property
    def features(self) -> Tensor:
        """`[N, D]` of the video tokens."""
        return self.embeds[self.video]


@torch.no_grad()
def encode(model: VideoModel, sample: Sample, config: TrainConfig) -> Prompt:
    """Vision tower and embeddings of one sample.

    Raises:
        BadRowError: the question or the answer cannot be written in the model's tokens.
    """
    grid = model.grid(len(sample.frames))
    total = grid[0] * grid[1] * grid[2]
    try:
        ids = model.prompt(sample.question, total)
    except UserError as error:
        raise BadRowError(f"{sample.name}: {error}") from None
    answer = model.tokenizer(sample.answer + config.answer_end, add_special_tokens=False)["input_ids"]
    if not answer:
        raise BadRowError(f"{sample.name}: answer {sample.answer!r} has no token.")
    answer = torch.tensor(answer, device=ids.device)
    video_mask = model.video_mask(ids)[0]
    prompt = model.embed(ids, model.encode_video(model.pixels(sample.frames), lambda fraction: None))[0]
    spoken = model.network.get_input_embeddings()(answer[:-1])
    return Prompt(
        sample,
        torch.cat([prompt, spoken]),
        video_mask,
        masked_positions(video_mask, total),
        masked_positions(~video_mask, len(prompt) - total),
        answer,
        grid,
    )


def policy_batch(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Arguments of a `CompressionPolicy` for a batch of prompts, padded on the right."""
    longest = max(prompt.length for prompt in prompts)
    padding = [longest - prompt.length for prompt in prompts]
    batch: dict[str, Any] = {
        "inputs_embeds": torch.stack(
            [F.pad(x.embeds[: x.length].float(), (0, 0, 0, more)) for x, more in zip(prompts, padding, strict=True)]
        ),
        "video_mask": torch.stack([F.pad(x.video_mask, (0, more)) for x, more in zip(prompts, padding, strict=True)]),
        "grid_thw": [prompt.grid for prompt in prompts],
    }
    if any(padding):
        real = torch.tensor([[i < x.length for i in range(longest)] for x in prompts])
        batch["attention_mask"] = real.to(prompts[0].embeds.device)
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
    # Every combination is an index into one copy of all prompts; -1, which sorts first, is padding on the left.
    rows, first = [], 0
    for prompt, chosen in zip(prompts, kept, strict=True):
        spoken = 0 if speaks else len(prompt.answer) - 1
        rest = torch.cat([prompt.text, torch.arange(prompt.length, prompt.length + spoken, device=chosen.device)])
        video = torch.where(chosen < 0, -1, prompt.video[chosen.clamp(min=0)])
        index = torch.cat([video, rest.expand(len(chosen), -1)], 1).sort(1).values
        rows.append(torch.where(index < 0, -1, index + first))
        first += len(prompt.embeds)
    longest = max(index.shape[1] for index in rows)
    index = torch.cat([F.pad(index, (longest - index.shape[1], 0), value=-1) for index in rows])  # [S * G, L']
    places = torch.cat([torch.arange(len(prompt.embeds), device=index.device) for prompt in prompts])
    embeds, positions = gather_tokens((torch.cat([prompt.embeds for prompt in prompts]), places), index)
    inputs = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": (index >= 0).long()}
    sizes = [len(chosen) for chosen in kept]
    if speaks:
        output = model.network.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
        texts = model.tokenizer.batch_decode(output, skip_special_tokens=True)
        starts = [sum(sizes[:s]) for s in range(len(sizes))]
        return [
            Attempts(prompt.sample, chosen, prompt.answer, None, texts[start : start + len(chosen)])
            for prompt, chosen, start in zip(prompts, kept, starts, strict=True)
        ]
    most = max(len(prompt.answer) for prompt in prompts)
    logits = model.network(**inputs, logits_to_keep=most, use_cache=False).logits  # [S * G, most, V]
    return [
        Attempts(prompt.sample, chosen, prompt.answer, rows[:, most - len(prompt.answer) :], None)
        for prompt, chosen, rows in zip(prompts, kept, logits.split(sizes), strict=True)
    ]
