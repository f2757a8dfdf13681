"""Train the tiny LLaVA-OneVision of the world from scratch: `python -m cacovid_kernels.demo.world.train_model`.

Every batch draws how many tokens stay, from 2 % of the video to all of it; the others are dropped before the language
model and positions are kept, so that the finished model understands few tokens as well as many. What stays is
random, except that the evidence for a random part of the questions always stays: else few tokens would teach
guessing. A question without any of its evidence left has a tenth of the weight. A second loss ties the video tokens
to the words for what they show, as the alignment stage of LLaVA does with captions, and a third one points the
attention of a question's last word to its evidence: both only shorten the time until the answers teach.

Everything is a function of (seed, step): a run that is stopped and started again with the same command goes on as if
nothing had happened, and ends in the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cacovid_kernels.demo.world.network import (
    READING_LAYERS,
    Batch,
    WorldGeometry,
    answer_loss,
    build_network,
    encode,
    grounding_loss,
    hidden_states,
    predict,
    watch_attention,
    world_batch,
)
from cacovid_kernels.demo.world.questions import KINDS, LABELS, word_tokenizer
from cacovid_kernels.demo.world.scenes import WorldConfig
from cacovid_kernels.errors import UserError

TRAIN, HELD_OUT = 0, 1  # seeds of the world
NO_EVIDENCE = 0.1
GROUNDED_LAYER = READING_LAYERS  # the first of those that look at what the words name


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters; `--config` reads them from a JSON file.

    Args:
        seed: of the initial weights and of what is dropped.
        steps: of AdamW.
        batch: videos per step; each is asked one question of every kind.
        learning_rate: after `warmup` steps of each stage; falls linearly to zero over the last `decay` of all steps.
        weight_decay: on everything.
        min_keep: the smallest share of tokens kept; above it, shares are a power of uniform numbers.
        short_steps: steps over which that power falls from 4 to 1.5.
        align_steps: first steps, in which video tokens are tied to words and no question is asked.
        align: weight of that tie afterwards.
        ground: weight of the loss that points a question's last word to the evidence.
        eval_every: steps between evaluations and checkpoints.
        eval_videos: held-out videos per evaluation.
    """

    seed: int = 0
    steps: int = 8000
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.25
    weight_decay: float = 0.02
    min_keep: float = 0.02
    short_steps: int = 3000
    align_steps: int = 200
    align: float = 0.5
    ground: float = 0.5
    eval_every: int = 200
    eval_videos: int = 100


class Trainer:
    """The run: weights, AdamW, the log, and where they are kept between starts."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder, self.world = config, folder, WorldConfig()
        self.tokenizer = word_tokenizer()
        self.network = build_network(WorldGeometry(), self.tokenizer, config.seed)
        self.named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.labels = torch.tensor([self.tokenizer.convert_tokens_to_ids(word) for word in LABELS])

    def run(self) -> None:
        """Train to the last step, from the checkpoint if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.load()
        started, losses = time.perf_counter() - self.seconds, []
        while self.step < self.config.steps:
            losses.append(self.train_step())
            self.step += 1
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self.seconds = time.perf_counter() - started
                self.log({"loss": float(np.mean(losses)), **self.evaluate()})
                losses.clear()
                self.save()

    def learning_rate(self, step: int) -> float:
        left = (self.config.steps - step) / max(1.0, self.config.decay * self.config.steps)
        since = step - self.config.align_steps if step >= self.config.align_steps else step  # each stage warms up
        return self.config.learning_rate * min(1.0, (since + 1) / self.config.warmup, left)

    def favour_few(self, step: int) -> float:
        """Power of the uniform number that says how many tokens stay: short prompts teach first, and cost less."""
        return 4.0 - 2.5 * min(1.0, step / self.config.short_steps)

    def train_step(self) -> float:
        config, world = self.config, self.world
        rng = np.random.default_rng((config.seed, self.step))
        batch = world_batch(
            TRAIN, range(self.step * config.batch, (self.step + 1) * config.batch), self.tokenizer, world
        )
        share = config.min_keep + (1 - config.min_keep) * rng.random() ** self.favour_few(self.step)
        keep = self.draw_kept(batch, round(share * world.tokens), rng)
        video = encode(self.network, batch.patches, keep)
        loss = self.alignment(video, batch.labels.gather(1, keep[..., None].expand(-1, -1, len(LABELS))))
        if self.step >= config.align_steps:
            with watch_attention(self.network, GROUNDED_LAYER) as seen:
                hidden = hidden_states(self.network, video, keep, world.tokens, batch.prompt)
            truth = batch.truth.gather(2, keep[:, None].expand(-1, len(KINDS), -1))
            weight = torch.where(truth.any(2), 1.0, NO_EVIDENCE)
            loss = config.align * loss + answer_loss(self.network, hidden, batch.prompt, weight)
            loss = loss + config.ground * grounding_loss(seen, truth, batch.prompt)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        return loss.item()

    def draw_kept(self, batch: Batch, count: int, rng: np.random.Generator) -> Tensor:
        """`[N, count]` ascending: random tokens, those that a random part of the questions needs before all others."""
        n, kinds, tokens = batch.truth.shape
        score = torch.from_numpy(rng.random((n, tokens)))
        needed = torch.from_numpy(rng.random((n, kinds)) < rng.random((n, 1)))
        score += (batch.truth & needed[..., None]).any(1)
        return score.topk(count).indices.sort(1).values

    def alignment(self, video: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each word against what each token shows: a logit is their product, less 3."""
        logits = video @ self.network.get_input_embeddings().weight[self.labels].T - 3
        return 10 * F.binary_cross_entropy_with_logits(logits, labels)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Share of right answers by kind: all tokens, 10 % at random, and 10 % with the evidence among them."""
        tokens, count = self.world.tokens, round(0.1 * self.world.tokens)
        batch = world_batch(HELD_OUT, range(self.config.eval_videos), self.tokenizer, self.world)
        random = torch.rand(batch.truth.shape[0], tokens, generator=torch.Generator().manual_seed(0))
        scores = {"all": None, "random 10%": random, "evidence 10%": random + batch.truth.any(1)}
        report = {}
        for name, score in scores.items():
            keep = torch.arange(tokens).expand(len(random), -1)
            if score is not None:
                keep = score.topk(count).indices.sort(1).values
            video = encode(self.network, batch.patches, keep)
            words = predict(self.network, hidden_states(self.network, video, keep, tokens, batch.prompt), batch.prompt)
            right = (words == batch.prompt.answers).float()
            by_kind = dict(zip(KINDS, right.mean(0).tolist(), strict=True))
            report[name] = {"mean": right.mean().item(), **by_kind}
        return report

    def log(self, record: dict[str, Any]) -> None:
        record = {"step": self.step, "seconds": round(self.seconds, 1), **_rounded(record)}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        means = {name: value["mean"] for name, value in record.items() if isinstance(value, dict)}
        print(f"step {self.step}: loss {record['loss']}, {means}", flush=True)

    def save(self) -> None:
        """One file, replaced in one step: weights, AdamW's moments, and as metadata the place in the run."""
        tensors = {name: parameter.detach() for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            if state := self.optimizer.state[parameter]:  # none before the first gradient
                tensors[f"{name}/first"], tensors[f"{name}/second"] = state["exp_avg"], state["exp_avg_sq"]
                tensors[f"{name}/steps"] = state["step"]
        place = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
        save_file(tensors, self.folder / "checkpoint.part", {"place": json.dumps(place)})
        os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.safetensors")

    def load(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            place = json.loads(file.metadata()["place"])
        before = {**place["config"], "steps": self.config.steps}  # where the run ends may change before it decays
        past_decay = place["step"] > (1 - self.config.decay) * min(self.config.steps, place["config"]["steps"])
        if before != asdict(self.config) or (past_decay and place["config"] != asdict(self.config)):
            raise UserError(f"--out: {path} is of another configuration. Choose another folder.")
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[name])
                if f"{name}/steps" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": tensors[f"{name}/steps"],
                        "exp_avg": tensors[f"{name}/first"],
                        "exp_avg_sq": tensors[f"{name}/second"],
                    }
        self.step, self.seconds = place["step"], place["seconds"]
        # Lines behind the checkpoint are written again.
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        (self.folder / "log.jsonl").write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def export(self) -> Path:
        """Write the model in the layout of Hugging Face, in half precision, with the record of its training."""
        out = self.folder / "model"
        self.network.half().save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        normalisation = {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
        _write_json(out / "preprocessor_config.json", normalisation)
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        record = {
            "command": "python -m cacovid_kernels.demo.world.train_model",
            "config": asdict(self.config),
            "seconds": round(self.seconds),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "torch": torch.__version__,
            "log": [json.loads(line) for line in lines],
        }
        _write_json(out / "training.json", record)
        return out


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Train, or go on training, and export."""
    parser = argparse.ArgumentParser(prog="python -m cacovid_kernels.demo.world.train_model", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with fields of TrainConfig")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint, log and finished model")
    parser.add_argument("--threads", type=int, default=2)
    for field in fields(TrainConfig):
        if field.name in ("seed", "steps"):
            parser.add_argument(f"--{field.name}", type=int, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    values = json.loads(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    values |= {name: getattr(arguments, name) for name in ("seed", "steps") if getattr(arguments, name) is not None}
    trainer = Trainer(TrainConfig(**values), arguments.out)
    try:
        trainer.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {trainer.export()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
