"""How well the frozen model of the world answers when a rule keeps few of the video's tokens.

`python -m cacovid_kernels.demo.world.evaluate`: every rule keeps the same number of tokens of the same fresh videos,
one question each; the prompt that is left has its original positions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from cacovid_kernels.demo.world import MODEL, POLICY
from cacovid_kernels.demo.world.questions import KINDS
from cacovid_kernels.demo.world.rules import RULES, Rule, answers_right, policy_rule, published_rule, samples
from cacovid_kernels.demo.world.scenes import WorldConfig
from cacovid_kernels.errors import UserError
from cacovid_kernels.policy import CompressionPolicy
from cacovid_kernels.video_models import load_model

FRESH = 2  # seed of the world: neither that of training nor the one looked at during training
RATIOS = (0.25, 0.2, 0.15, 0.1, 0.05, 0.02)
ALL, UNTRAINED, TRAINED = "all tokens", "untrained policy", "trained policy"


@dataclass
class Score:
    """What one rule led to at one share of tokens; lists have an entry per kind of question."""

    rule: str
    ratio: float
    tokens: int  # kept of each video
    right: list[int] = field(default_factory=lambda: [0] * len(KINDS))
    asked: list[int] = field(default_factory=lambda: [0] * len(KINDS))
    named_kept: int = 0  # tokens kept that show the named object when it matters
    named: int = 0  # tokens that do

    @property
    def share(self) -> float:
        """Of right answers."""
        return sum(self.right) / sum(self.asked)

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % Wilson interval of `share`."""
        return wilson(sum(self.right), sum(self.asked))

    @property
    def on_named(self) -> float:
        """Share of the tokens kept that lie on the named object."""
        return self.named_kept / (self.tokens * sum(self.asked))

    @property
    def named_found(self) -> float:
        """Share of the named object's tokens that are kept."""
        return self.named_kept / self.named


def wilson(right: float, asked: float) -> tuple[float, float]:
    """Ends of the 95 % Wilson interval of a share."""
    z = 1.959964
    share = right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return (middle - half) / scale, (middle + half) / scale


@torch.no_grad()
def evaluate(
    network: Any,
    tokenizer: Any,
    *,
    rules: Mapping[str, Rule] = RULES,
    ratios: Sequence[float] = RATIOS,
    count: int = 3000,
    seed: int = FRESH,
    config: WorldConfig | None = None,
) -> list[Score]:
    """Right answers of every rule at every ratio, on the same questions, and of the whole prompt at ratio 1.

    Args:
        network: a frozen LLaVA-OneVision of the world.
        tokenizer: its tokenizer.
        rules: by name; each says which tokens of a sample stay.
        ratios: shares of the video's tokens that stay, in (0, 1], rounded to whole tokens, at least one.
        count: videos, one question each.
        seed: of the world.
        config: size of the world; the default world when absent.
    """
    config = config or WorldConfig()
    everything = torch.arange(config.tokens)
    scores = [Score(ALL, 1.0, config.tokens)]
    scores += [Score(name, ratio, max(round(ratio * config.tokens), 1)) for name in rules for ratio in ratios]
    for kind, sample in samples(network, tokenizer, config, seed, count):
        for score in scores:
            if score.rule == ALL:
                keep = everything.expand(len(sample.truth), -1)
            else:
                keep = rules[score.rule](sample, score.tokens)
            score.right[kind] += int(answers_right(sample, keep).sum())
            score.asked[kind] += len(keep)
            score.named_kept += int(sample.truth.gather(1, keep).sum())
            score.named += int(sample.truth.sum())
    return scores


def policy_rules(network: Any, trained: CompressionPolicy) -> dict[str, Rule]:
    """A trained policy's rules, and that of a policy as training begins: the model's first layer, random heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = CompressionPolicy.from_language_model(network.model.language_model)
    return {
        UNTRAINED: policy_rule(untrained),
        TRAINED: policy_rule(trained),
        f"{TRAINED}, published budget": published_rule(trained),
    }


def main() -> int:
    """Evaluate every rule and both policies, print the table, write the counts."""
    from cacovid_kernels.demo.world.tables import main_table

    parser = argparse.ArgumentParser(prog="python -m cacovid_kernels.demo.world.evaluate", description=__doc__)
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="default: the one that comes along")
    parser.add_argument("--policy", default=str(POLICY), metavar="DIR", help="default: the one that comes along")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="shares of tokens kept")
    parser.add_argument("--count", type=int, default=3000, help="questions")
    parser.add_argument("--seed", type=int, default=FRESH, help="of the world")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the counts, as JSON")
    arguments = parser.parse_args()
    if arguments.count < 1 or not all(0 < ratio <= 1 for ratio in arguments.ratios):
        parser.error(f"--count={arguments.count} must be at least 1 and --ratios={arguments.ratios} in (0, 1].")
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.perf_counter()
    try:
        model = load_model(arguments.model)
        policy = CompressionPolicy.from_pretrained(arguments.policy, dtype=torch.float32)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: --policy: {arguments.policy} cannot be loaded: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    network = model.network.float()
    scores = evaluate(
        network,
        model.tokenizer,
        rules={**RULES, **policy_rules(network, policy)},
        ratios=arguments.ratios,
        count=arguments.count,
        seed=arguments.seed,
    )
    print(main_table(scores))
    if arguments.out:
        record = {
            "command": "python -m cacovid_kernels.demo.world.evaluate",
            "world_seed": arguments.seed,
            "questions": arguments.count,
            "kinds": KINDS,
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - began),
            "scores": [asdict(score) for score in scores],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(_compact(record), encoding="utf-8")
    return 0


def _compact(record: dict[str, Any]) -> str:
    """JSON with one line per score."""
    scores = ",\n  ".join(json.dumps(score) for score in record["scores"])
    head = json.dumps({**record, "scores": []}, indent=1)
    return head.replace('"scores": []', f'"scores": [\n  {scores}\n ]') + "\n"


if __name__ == "__main__":
    sys.exit(main())
