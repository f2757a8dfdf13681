"""How well the frozen model of the procedural world answers when a rule keeps few of the video's tokens.

`python -m cacovid_kernels.demo.evaluate`: every rule keeps the same number of tokens of the same fresh videos, one
question each; the prompt that is left has its original positions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacovid_kernels.compressors import divprune, evs, fastv, vidcom2
from cacovid_kernels.compressors._keep import keep_largest
from cacovid_kernels.demo.model import load_model
from cacovid_kernels.demo.questions import KINDS
from cacovid_kernels.demo.world import WorldConfig
from cacovid_kernels.demo.world_model import Batch, Prompt, encode, hidden_states, predict, watch_attention, world_batch

FRESH = 2  # seed of the world: neither that of training nor the one looked at during training
RATIOS = (0.25, 0.2, 0.15, 0.1, 0.05, 0.02)
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


def attention(sample: Sample, count: int) -> Tensor:
    """FastV's rule, from the whole prompt."""
    query, keys, mask = last_query_and_keys(sample, FASTV_LAYER)
    return fastv(query, keys, mask, count)


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


RULES: dict[str, Rule] = {
    "random": lambda sample, count: keep_largest(sample.random, count),
    "uniform": uniform,
    "attention (FastV)": attention,
    "diversity (DivPrune)": lambda sample, count: divprune(sample.features, count),
    "frame difference (EVS)": lambda sample, count: evs(sample.features, count),
    "centre distance (VidCom2)": lambda sample, count: vidcom2(sample.features, count),
    "frame difference, any frame": _difference,
    "brightest": lambda sample, count: keep_largest(sample.pixels.mean(-1), count),
    "most saturated": _saturation,
    "largest norm": lambda sample, count: keep_largest(sample.embeddings.norm(dim=-1), count),
    "least like its frame": _unlike_frame,
    "evidence first": lambda sample, count: keep_largest(sample.random + sample.truth, count),
}


@dataclass
class Score:
    """Right answers by kind of question."""

    right: np.ndarray  # [KINDS]
    asked: np.ndarray  # [KINDS]
    on_evidence: float = 0.0  # tokens kept that hold evidence

    def interval(self, kind: int | None = None) -> tuple[float, float, float]:
        """Share of right answers, of one kind or of all, and the ends of its 95 % Wilson interval."""
        right = float(self.right.sum() if kind is None else self.right[kind])
        asked = float(self.asked.sum() if kind is None else self.asked[kind])
        return wilson(right, asked)


def wilson(right: float, asked: float) -> tuple[float, float, float]:
    """Share and the ends of its 95 % Wilson interval."""
    z = 1.959964
    share = right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return share, (middle - half) / scale, (middle + half) / scale


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


@torch.no_grad()
def evaluate(
    network: Any,
    tokenizer: Any,
    *,
    rules: dict[str, Rule] = RULES,
    ratios: tuple[float, ...] = RATIOS,
    count: int = 2000,
    seed: int = FRESH,
    config: WorldConfig | None = None,
) -> dict[tuple[str, float], Score]:
    """Right answers of every rule at every ratio, on the same questions, and of the whole prompt at ratio 1.

    Args:
        network: a frozen LLaVA-OneVision of the world.
        tokenizer: its tokenizer.
        rules: by name; each says which tokens of a sample stay.
        ratios: shares of the video's tokens that stay, rounded to whole tokens.
        count: videos, one question each.
        seed: of the world.
        config: size of the world; the default world when absent.
    """
    config = config or WorldConfig()
    names = [("all tokens", 1.0), *((name, ratio) for name in rules for ratio in ratios)]
    scores = {name: Score(np.zeros(len(KINDS)), np.zeros(len(KINDS))) for name in names}
    for kind, sample in samples(network, tokenizer, config, seed, count):
        for (name, ratio), score in scores.items():
            if name == "all tokens":
                keep = torch.arange(config.tokens).expand(len(sample.truth), -1)
            else:
                keep = rules[name](sample, round(ratio * config.tokens))
            right = answers_right(sample, keep)
            score.right[kind] += int(right.sum())
            score.asked[kind] += len(right)
            score.on_evidence += float(sample.truth.gather(1, keep).float().mean(1).sum())
    return scores


def table(scores: dict[tuple[str, float], Score]) -> str:
    """The scores as a Markdown table: one line per rule and ratio, columns by kind."""
    lines = [
        f"| rule | kept | right | 95 % interval | {' | '.join(KINDS)} | kept on evidence |",
        "|" + " --- |" * (5 + len(KINDS)),
    ]
    for (name, ratio), score in scores.items():
        share, low, high = score.interval()
        kinds = " | ".join(f"{100 * score.interval(kind)[0]:.1f}" for kind in range(len(KINDS)))
        evidence = 100 * score.on_evidence / score.asked.sum()
        lines.append(
            f"| {name} | {100 * ratio:g} % | {100 * share:.1f} | {100 * low:.1f} to {100 * high:.1f} | {kinds} "
            f"| {evidence:.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    """Evaluate the shipped model, or one in `--model`, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m cacovid_kernels.demo.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the `model` folder of a training run")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--count", type=int, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=FRESH)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    network = model.network.float()
    scores = evaluate(
        network, model.tokenizer, ratios=tuple(arguments.ratios), count=arguments.count, seed=arguments.seed
    )
    print(table(scores))
    if arguments.json:
        record = [
            {"rule": name, "ratio": ratio, "right": score.right.tolist(), "asked": score.asked.tolist()}
            for (name, ratio), score in scores.items()
        ]
        arguments.json.write_text(json.dumps({"kinds": KINDS, "scores": record}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
