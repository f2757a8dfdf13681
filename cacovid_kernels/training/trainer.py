"""The training loop: draw, answer, reward, remember, optimise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from cacovid_kernels.errors import UserError
from cacovid_kernels.policy import CompressionPolicy, PolicyScores
from cacovid_kernels.samples import Rows
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.data import Skipped, order_of_epoch, read_usable
from cacovid_kernels.training.log import Log
from cacovid_kernels.training.losses import sample_loss
from cacovid_kernels.training.memory import Memory, adapted_keep_ratio
from cacovid_kernels.training.metrics import StepMetrics
from cacovid_kernels.training.rewards import REWARDS, Reward
from cacovid_kernels.training.rollout import Prompt, attempt, encode, policy_batch
from cacovid_kernels.training.samplers import SAMPLERS, Scene
from cacovid_kernels.training.stages import Stages
from cacovid_kernels.training.state import State, check_accelerator, first_policy, optimizer_groups
from cacovid_kernels.video_models import VideoModel


class _Sample:
    """One sample of a step and what the step has found out about it."""

    def __init__(self, number: int, prompt: Prompt, keep_ratio: float) -> None:
        self.number, self.prompt = number, prompt
        self.memory = Memory(keep_ratio)
        self.scene: Scene  # from the scores before the first iteration, when they are known
        self.old: PolicyScores


class Trainer:
    """Trains a compression policy against a frozen video-language model.

    One step takes `batch_size * gradient_accumulation * processes` samples and optimises the policy
    `num_iterations` times on them. Every random number is a function of the seed and the sample's number, so
    a run that was stopped goes on bit for bit, and another number of processes draws the same.

    Args:
        config: how to train.
        model: the frozen model.
        rows: the data set.
        policy: the policy to train, or None for what `config.policy` says.
        reward: how combinations are rewarded, or None for what `config.reward` says.
        accelerator: of Hugging Face Accelerate, or None for one with its launcher's settings.

    Raises:
        UserError: an argument cannot be used.

    Example:
        >>> import numpy as np, tempfile
        >>> from cacovid_kernels.video_models import TinyGeometry, tiny_model
        >>> from cacovid_kernels.training import Sample, TrainConfig, Trainer
        >>> model = tiny_model(TinyGeometry(image_size=56, vision_width=16, vision_layers=1, width=32, layers=1))
        >>> rows = [Sample("grey", np.full((2, 56, 56, 3), 128, np.uint8), "which colour?", "grey")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TrainConfig(output=folder, keep_ratio=0.5, num_token=3, num_frame=1, num_iterations=1)
        ...     policy = Trainer(config, model, rows).train()
        >>> policy.config.hidden_size
        32
    """

    def __init__(
        self,
        config: TrainConfig,
        model: VideoModel,
        rows: Rows,
        *,
        policy: CompressionPolicy | None = None,
        reward: Reward | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        if len(rows) == 0:
            raise UserError("data: no rows. Give at least one.")
        _check_answer_end(config, model.tokenizer)
        self.config, self.model, self.rows = config, model, rows
        self.reward = REWARDS[config.reward] if reward is None else reward
        self.accelerator = accelerator or Accelerator()
        check_accelerator(self.accelerator)
        # Set, not passed: a launcher's environment would overrule an argument.
        self.accelerator.gradient_accumulation_steps = config.gradient_accumulation
        self._freeze()
        policy = first_policy(config, model) if policy is None else policy
        optimizer = torch.optim.AdamW(optimizer_groups(policy.float().train(), config))
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.per_pass = config.batch_size * self.accelerator.num_processes
        self.per_step = self.per_pass * config.gradient_accumulation
        self.steps = config.max_steps or max(config.epochs * len(rows) // self.per_step, 1)
        self.state = State(self.accelerator, self.policy, self.optimizer, config, policy.config, self.per_step)
        self.stages = Stages(self.accelerator.device)
        self.skipped = Skipped(config.max_bad_rows)
        self._order = lru_cache(maxsize=2)(lambda epoch: order_of_epoch(len(rows), epoch, config.seed))

    def train(self) -> CompressionPolicy:
        """Train to the end, from the newest intact checkpoint of `config.output` or from the start.

        Returns:
            The trained policy, which is also written to `<output>/policy` under its official names.

        Raises:
            UserError: the checkpoint was made with other settings, or too many rows are bad.
            FloatingPointError: a reward, a loss or the gradient is not finite; the message names the sample.
        """
        output, start = Path(self.config.output), self.state.resume()
        main = self.accelerator.is_main_process
        with Log(output, start, self.steps) if main else nullcontext() as log:
            if log and start:
                log.say(f"resumed after step {start}")
            for step in range(start + 1, self.steps + 1):
                began = time.perf_counter()
                scalars = self._step(step)
                seconds = time.perf_counter() - began
                if log:
                    drawn = self.per_step * self.config.num_iterations * self.config.num_combinations
                    log.step(step, {**scalars, "combinations_per_second": drawn / seconds})
                if step % self.config.save_every == 0 or step == self.steps:
                    with self.stages("checkpoint"):
                        self.state.save(step)
                    self.stages.collect()
                    if log:
                        log.say(f"step {step}: checkpoint; time: {self.stages.shares()}")
        return self.state.export(output / "policy")

    def _freeze(self) -> None:
        network, dtype, device = self.model.network, self.config.dtype, self.accelerator.device
        if dtype == "auto":
            wanted = torch.float32 if device.type == "cpu" else network.dtype
        else:
            wanted = getattr(torch, dtype)
        network.to(device, wanted).eval().requires_grad_(False)

    def _step(self, step: int) -> dict[str, float]:
        """All iterations on the samples of one step; the step's scalars."""
        metrics, iterations = StepMetrics(), self.config.num_iterations
        with self.stages("read and embed"):
            passes = [self._samples(step, m) for m in range(self.config.gradient_accumulation)]
            batches = [policy_batch([sample.prompt for sample in samples]) for samples in passes]
        for iteration in range(iterations):
            rate = self._learning_rate((step - 1) * iterations + iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            for samples, batch in zip(passes, batches, strict=True):
                with self.accelerator.accumulate(self.policy):
                    self._iterate(samples, batch, iteration, metrics)
        scalars = metrics.finish(self.accelerator)
        self.stages.collect()
        return {**scalars, "learning_rate": self._learning_rate(step * iterations - 1)}

    def _iterate(self, samples: Sequence[_Sample], batch: dict[str, Any], iteration: int, metrics: StepMetrics) -> None:
        """One draw for every sample and one backward pass over all their draws so far."""
        with self.stages("policy"):
            scores = _split(self.policy(**batch), [sample.prompt for sample in samples])
        if iteration == 0:
            for sample, found in zip(samples, scores, strict=True):
                sample.old = PolicyScores(*(x.detach() for x in found))
                sample.scene = Scene(sample.old.tokens, sample.old.frames, sample.prompt.features, sample.prompt.grid)
                metrics.entropy(sample.scene)
        self._explore(samples, iteration, metrics)
        with self.stages("loss and backward"):
            losses = []
            for sample, found in zip(samples, scores, strict=True):
                losses.append(sample_loss(found, sample.old, sample.memory, self.config))
                metrics.loss(sample.prompt, losses[-1])
            self.accelerator.backward(torch.stack(losses).mean())
        with self.stages("optimiser"):
            if self.accelerator.sync_gradients:
                most = self.config.max_grad_norm or math.inf
                norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), most)
                metrics.scalar("gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _explore(self, samples: Sequence[_Sample], iteration: int, metrics: StepMetrics) -> None:
        """Draw combinations for every sample, let the model answer from them, and remember what they earned."""
        config = self.config
        with self.stages("sample"):
            draws = []
            for sample in samples:
                memory = sample.memory
                if iteration > 0:
                    memory.keep_ratio = adapted_keep_ratio(memory.keep_ratio, memory.accuracy, config)
                step = sample.number * config.num_iterations + iteration
                draws.append(SAMPLERS[config.sampler](sample.scene, memory.keep_ratio, step, config))
        with self.stages("frozen model"):
            prompts, kept = [sample.prompt for sample in samples], [draw.kept for draw in draws]
            attempts = attempt(self.model, prompts, kept, config, speaks=self.reward.speaks)
        with self.stages("reward"):
            reward, accuracy = self.reward.function, self.reward.accuracy
            earned = [reward(one).float() for one in attempts]
            right = earned if accuracy is reward else [accuracy(one).float() for one in attempts]
            # The one wait of an iteration: how hard a sample is decides how many tokens its next draw keeps.
            known = torch.stack([torch.cat(earned), torch.cat(right)]).tolist()
        first = 0
        for sample, draw, rewards in zip(samples, draws, earned, strict=True):
            rows = slice(first, first + len(rewards))
            first = rows.stop
            metrics.draw(sample.prompt, draw, known[0][rows], known[1][rows])
            sample.memory.add(draw, rewards, known[1][rows])

    def _samples(self, step: int, part: int) -> list[_Sample]:
        """This process's samples of one pass; they are numbered over all steps, passes and processes."""
        config, size = self.config, len(self.rows)
        first = (step - 1) * self.per_step + part * self.per_pass + self.accelerator.process_index * config.batch_size
        samples = []
        for number in range(first, first + config.batch_size):
            order, place = self._order(number // size), number % size
            prompt = read_usable(self.rows, order, place, self.skipped, lambda x: encode(self.model, x, config))
            samples.append(_Sample(number, prompt, config.keep_ratio))
        return samples

    def _learning_rate(self, update: int) -> float:
        """Half a cosine from the configured rate to 0 over all updates of the run.

        The published trainer steps its schedule with every update but sizes it by samples, so that it swings
        `num_iterations` times between the rate and 0.
        """
        updates = self.steps if self.config.mode == "official" else self.steps * self.config.num_iterations
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * update / updates))


def _check_answer_end(config: TrainConfig, tokenizer: Any) -> None:
    pieces = len(tokenizer(config.answer_end, add_special_tokens=False)["input_ids"])
    if pieces > 1:
        its_own = getattr(tokenizer, "eos_token", None)
        raise UserError(
            f"training: answer_end={config.answer_end!r} is {pieces} tokens of this model, it must be the one that "
            f"ends its answers. Give that{f', perhaps {its_own!r}' if its_own else ''}, or ''."
        )


def _split(scores: PolicyScores, prompts: Sequence[Prompt]) -> list[PolicyScores]:
    """The scores of a batch, prompt by prompt."""
    tokens = scores.tokens.split([len(prompt.video) for prompt in prompts])
    frames = scores.frames.split([prompt.grid[0] for prompt in prompts])
    return [PolicyScores(*one) for one in zip(tokens, frames, scores.modes, strict=True)]
