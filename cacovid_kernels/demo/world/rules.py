"""Which tokens stay: rules that look at one sample of the world, hand-made ones and a policy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacovid_kernels.compressors import divprune, evs, fastv, vidcom2
from cacovid_kernels.compressors._keep import keep_largest
from cacovid_kernels.demo.world.network import (
    Batch,
    Prompt,
    encode,
    hidden_states,
    predict,
    watch_attention,
    world_batch,
)
from cacovid_kernels.demo.world.questions import KINDS
from cacovid_kernels.demo.world.scenes import SIDE, WorldConfig
from cacovid_kernels.ops.select import select_tokens
from cacovid_kernels.policy import CompressionPolicy, PolicyScores

FASTV_LAYER = 1  # counted from 0: attention of the second layer, the published default


@dataclass(frozen=True)
class Sample:
    """B videos, one question each, and what a rule may look at."""

    embeddings: Tensor  # [B, N, D] video tokens as the language model gets them
    pixels: Tensor  # [B, N, 3 * 64] float32 in [0, 1]: the pixels of each token
    prompt: Prompt  # with one question
    truth: Tensor  # [B, N] bool: tokens that hold the evidence
    random: Tensor  # [B, N] float32, uniform
    network: Any
    config: WorldConfig

    @property
    def features(self) -> Tensor:
        """`[B, T, P, D]`."""
        return self.embeddings.unflatten(1, (self.config.frames, -1))


Rule = Callable[[Sample, int], Tensor]  # a sample and a count -> [B, count] int64, ascending


def uniform(sample: Sample, count: int) -> Tensor:
    """Equal distances along the flat video, as the published policy fills up."""
    n, tokens = sample.embeddings.shape[:2]
    return ((torch.arange(count) + 0.5) * tokens / count).long().expand(n, -1)


def attention(layer: int) -> Rule:
    """FastV's rule: the attention of the word that answers, in a decoder layer of the whole prompt."""

    def rule(sample: Sample, count: int) -> Tensor:
        query, keys, mask = last_query_and_keys(sample, layer)
        return fastv(query, keys, mask, count)

    return rule


def last_query_and_keys(sample: Sample, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[B, H, D]` of the word that answers, keys `[B, K, L, D]` of the prompt up to it, video mask `[L]`."""
    tokens = sample.config.tokens
    keep = torch.arange(tokens).expand(len(sample.embeddings), -1)
    with watch_attention(sample.network, layer) as seen:
        hidden_states(sample.network, sample.embeddings, keep, tokens, sample.prompt)
    lead = len(sample.prompt.before)
    asked = lead + tokens + 1 + int(sample.prompt.asked[0])
    mask = torch.zeros(asked + 1, dtype=torch.bool)
    mask[lead : lead + tokens] = True
    return seen["query"][:, :, asked], seen["keys"][:, :, : asked + 1], mask


def _difference(sample: Sample, count: int) -> Tensor:
    """The change that EVS looks at, without its preference for the first frame."""
    change = 1 - torch.cosine_similarity(sample.features[:, 1:], sample.features[:, :-1], dim=-1)
    return keep_largest(torch.cat([torch.zeros_like(change[:, :1]), change], 1).flatten(1), count)


def _saturation(sample: Sample, count: int) -> Tensor:
    pixels = sample.pixels.unflatten(-1, (3, -1))
    return keep_largest((pixels.amax(-2) - pixels.amin(-2)).mean(-1), count)


def _unlike_frame(sample: Sample, count: int) -> Tensor:
    features = sample.features
    return keep_largest((features - features.mean(2, keepdim=True)).norm(dim=-1).flatten(1), count)


def policy_scores(policy: CompressionPolicy, sample: Sample) -> PolicyScores:
    """What a policy says of the sample's prompts."""
    prompt, video = sample.prompt, sample.embeddings
    n, tokens = video.shape[:2]
    table = sample.network.get_input_embeddings()
    before, question = table(prompt.before).expand(n, -1, -1), table(prompt.blocks[:, : int(prompt.asked[0]) + 1])
    newline = sample.network.model.image_newline.expand(n, 1, -1)
    embeds = torch.cat([before, video, newline, question], 1)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    mask[:, before.shape[1] : before.shape[1] + tokens] = True
    return policy(embeds, video_mask=mask, grid_thw=[(sample.config.frames, SIDE, SIDE)] * n)


def policy_rule(policy: CompressionPolicy) -> Rule:
    """The highest of a policy's token scores in the whole video."""
    return lambda sample, count: keep_largest(policy_scores(policy, sample).tokens.view(len(sample.truth), -1), count)


def published_rule(policy: CompressionPolicy) -> Rule:
    """The published evaluation: a budget per frame, half of it by score, the rest uniform."""

    def rule(sample: Sample, count: int) -> Tensor:
        scores, (n, tokens) = policy_scores(policy, sample), sample.truth.shape
        grid = [(sample.config.frames, SIDE, SIDE)] * n
        chosen = select_tokens(scores.tokens, scores.frames, grid, num_tokens=count)
        return chosen.indices.view(n, count) - torch.arange(0, n * tokens, tokens)[:, None]

    return rule


RULES: dict[str, Rule] = {
    "random": lambda sample, count: keep_largest(sample.random, count),
    "uniform": uniform,
    "attention (FastV)": attention(FASTV_LAYER),
    "diversity (DivPrune)": lambda sample, count: divprune(sample.features, count),
    "frame difference (EVS)": lambda sample, count: evs(sample.features, count),
    "centre distance (VidCom2)": lambda sample, count: vidcom2(sample.features, count),
    "frame difference, any frame": _difference,
    "brightest": lambda sample, count: keep_largest(sample.pixels.mean(-1), count),
    "most saturated": _saturation,
    "largest norm": lambda sample, count: keep_largest(sample.embeddings.norm(dim=-1), count),
    "least like its frame": _unlike_frame,
    "attention, one layer later": attention(FASTV_LAYER + 1),
    "evidence first": lambda sample, count: keep_largest(sample.random + sample.truth, count),
}


def samples(network: Any, tokenizer: Any, config: WorldConfig, seed: int, count: int) -> Iterator[tuple[int, Sample]]:
    """(kind, sample) over `count` videos: video i is asked its question of kind i mod 6."""
    size = 64 * len(KINDS)
    for start in range(0, count, size):
        index = np.arange(start, min(start + size, count))
        batch = world_batch(seed, index, tokenizer, config)
        everything = torch.arange(config.tokens).expand(len(index), -1)
        embeddings = encode(network, batch.patches, everything)
        random = torch.rand(len(index), config.tokens, generator=torch.Generator().manual_seed(seed + start))
        for kind in range(len(KINDS)):
            rows = torch.from_numpy(np.flatnonzero(index % len(KINDS) == kind))
            if len(rows):
                yield kind, _sample(batch, rows, kind, embeddings, random, network, config)


def _sample(
    batch: Batch, rows: Tensor, kind: int, embeddings: Tensor, random: Tensor, network: Any, config: WorldConfig
) -> Sample:
    mine = batch.prompt.kind == kind
    asked = batch.prompt.offset[batch.prompt.asked[kind]]
    prompt = Prompt(
        batch.prompt.before,
        batch.prompt.blocks[rows][:, mine],
        asked[None],
        batch.prompt.kind[mine],
        batch.prompt.offset[mine],
        batch.prompt.answers[rows, kind, None],
        batch.prompt.tail,
    )
    pixels = batch.patches[rows].unflatten(-1, (3, -1)).transpose(2, 3).flatten(2).float() / 255
    return Sample(embeddings[rows], pixels, prompt, batch.truth[rows, kind], random[rows], network, config)


def answers_right(sample: Sample, keep: Tensor) -> Tensor:
    """`[B]` bool: the model's word, given the tokens kept `[B, k]`, is the answer."""
    video = sample.embeddings.gather(1, keep[..., None].expand(-1, -1, sample.embeddings.shape[-1]))
    hidden = hidden_states(sample.network, video, keep, sample.config.tokens, sample.prompt)
    return (predict(sample.network, hidden, sample.prompt) == sample.prompt.answers)[:, 0]
