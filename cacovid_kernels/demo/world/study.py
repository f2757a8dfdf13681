"""Which sampler learns fastest: `python -m cacovid_kernels.demo.world.study`.

Every sampler trains the same policy on the same questions with the same number of answers of the frozen model, at
several shares of tokens, with several seeds. Reward is what the draws earned while training; accuracy is that of the
policy's best tokens on questions that no run has seen. A run that is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from cacovid_kernels.demo.world import MODEL
from cacovid_kernels.demo.world.evaluate import evaluate
from cacovid_kernels.demo.world.rows import WorldRows
from cacovid_kernels.demo.world.rules import policy_rule
from cacovid_kernels.demo.world.scenes import CELLS, WorldConfig
from cacovid_kernels.errors import UserError
from cacovid_kernels.policy import CompressionPolicy
from cacovid_kernels.samples import Sample
from cacovid_kernels.training.config import SAMPLERS, TrainConfig
from cacovid_kernels.training.trainer import Trainer
from cacovid_kernels.video_models import VideoModel, load_model

RATIOS = (0.02, 0.05, 0.1)
SEEDS = (0, 1, 2)
HELD_OUT = 4  # seed of the world


def study_config(sampler: str, ratio: float, seed: int, steps: int, output: str) -> TrainConfig:
    """One run: draws of tokens alone, and always as many of them."""
    return TrainConfig(
        data="world", output=output, sampler=sampler, keep_ratio=ratio, min_keep_ratio=ratio, max_keep_ratio=ratio,
        num_content=0, num_token=16, num_frame=0, num_iterations=1, batch_size=16, learning_rate=2e-3,
        decoder_lr_scale=1.0, max_grad_norm=1.0, max_steps=steps, save_every=max(steps // 5, 1), keep_checkpoints=99,
        seed=seed,
    )  # fmt: skip


def run(
    model: VideoModel, rows: list[Sample], sampler: str, ratio: float, seed: int, steps: int, questions: int
) -> dict[str, Any]:
    """Train once on all rows; the curve of rewards, and the accuracy of what was learned at five steps."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = study_config(sampler, ratio, seed, steps, folder)
        Trainer(config, model, rows).train()
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        spent = time.perf_counter() - began
        # As many tokens as the sampler draws: at least one for every frame.
        frames = WorldConfig().frames
        kept = frames * max(round(ratio * CELLS), 1) / (frames * CELLS)
        accuracy = []
        for checkpoint in sorted((Path(folder) / "checkpoints").iterdir()):
            policy = CompressionPolicy.from_pretrained(checkpoint)
            scores = evaluate(
                model.network, model.tokenizer, rules={"policy": policy_rule(policy)}, ratios=(kept,),
                count=questions, seed=HELD_OUT,
            )  # fmt: skip
            accuracy.append([int(checkpoint.name.split("-")[1]), round(scores[-1].share, 4)])
    size = max(steps // 50, 1)
    reward = []
    for first in range(0, steps, size):
        part = lines[first : first + size]
        reward.append([first + len(part), round(sum(line["reward/token"] for line in part) / len(part), 4)])
    return {
        "sampler": sampler, "ratio": ratio, "seed": seed, "steps": steps, "kept": round(kept, 4),
        "questions": questions, "seconds": round(spent), "reward": reward, "accuracy": accuracy,
    }  # fmt: skip


def main() -> int:
    """Run what is missing, one line of the file per run."""
    parser = argparse.ArgumentParser(prog="python -m cacovid_kernels.demo.world.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one per run")
    parser.add_argument("--model", default=str(MODEL), metavar="DIR", help="default: the one that comes along")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="shares of tokens kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=600, help="of 16 questions and 16 combinations each")
    parser.add_argument("--questions", type=int, default=600, help="of every evaluation")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = load_model(arguments.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[Sample] = []  # the same for all runs, each in its own order
    for first in range(0, 16 * arguments.steps, 64):
        rows += WorldRows().samples(range(first, min(first + 64, 16 * arguments.steps)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, ratio, sampler in product(arguments.seeds, arguments.ratios, arguments.samplers):
        done = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
        names = [tuple(json.loads(line)[name] for name in ("sampler", "ratio", "seed", "steps")) for line in done]
        if (sampler, ratio, seed, arguments.steps) in names:
            continue
        record = run(model, rows, sampler, ratio, seed, arguments.steps, arguments.questions)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{sampler} {ratio:g} seed {seed}: reward {record['reward'][-1][1]}, accuracy {record['accuracy'][-1][1]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
