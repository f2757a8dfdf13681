"""What is known of one step, collected on the device and read once; a number that is none names its sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from cacovid_kernels.training.rollout import Prompt
from cacovid_kernels.training.samplers import Draw, Scene


class StepMetrics:
    """Means over the samples, combinations and iterations of one step, of this process and then of all."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._losses: list[tuple[str, Tensor]] = []
        self._scalars: dict[str, list[Tensor]] = {}

    def draw(self, prompt: Prompt, draw: Draw, rewards: Sequence[float], accuracy: Sequence[float]) -> None:
        """Take what one draw of one sample earned.

        Raises:
            FloatingPointError: a reward is not finite.
        """
        if not all(map(math.isfinite, rewards)):
            raise FloatingPointError(f"training: the reward of {prompt.sample.name} is not finite: {list(rewards)}.")
        for name, rows in draw.rows.items():
            self._add(f"reward/{name}", rewards[rows])
            if name in draw.terms:  # not what the policy had no part in
                self._add("reward", rewards[rows])
                self._add("accuracy", accuracy[rows])
        self._add("kept_ratio", [draw.kept.shape[1] / len(prompt.video)])

    def entropy(self, scene: Scene) -> None:
        """Take how undecided the token scores of a video are: 1 where all tokens of a frame are alike, 0 when sure."""
        t, h, w = scene.grid
        log_prob = scene.tokens.reshape(t, h * w).log_softmax(-1)
        self.scalar("entropy", -(log_prob.exp() * log_prob).sum(-1).mean() / max(math.log(h * w), 1e-9))

    def loss(self, prompt: Prompt, loss: Tensor) -> None:
        """Take the loss of one sample in one iteration."""
        self._losses.append((prompt.sample.name, loss.detach()))

    def scalar(self, name: str, value: Tensor) -> None:
        """Take a scalar that is on the device."""
        self._scalars.setdefault(name, []).append(value.detach())

    def finish(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes.

        Raises:
            FloatingPointError: a loss, or the gradient, is not finite.
        """
        on_device = {"loss": [loss for _, loss in self._losses], **self._scalars}
        values = torch.stack([x.double() for group in on_device.values() for x in group]).tolist()  # the one read
        for (sample, _), value in zip(self._losses, values, strict=False):
            if not math.isfinite(value):
                raise FloatingPointError(f"training: the loss of {sample} is {value}.")
        for name, group in on_device.items():
            self._values[name] = values[: len(group)]
            del values[: len(group)]
        if not all(map(math.isfinite, self._values["gradient_norm"])):
            samples = ", ".join(dict.fromkeys(sample for sample, _ in self._losses))
            raise FloatingPointError(f"training: the gradient of {samples}, or of another process, is not finite.")
        names = sorted(self._values)
        mine = torch.tensor([x for name in names for x in self._values[name]], dtype=torch.float64)
        everyone = accelerator.gather(mine.to(accelerator.device)).view(-1, len(mine)).T.tolist()  # [values][processes]
        means = {}
        for name in names:
            part = [x for row in everyone[: len(self._values[name])] for x in row]
            del everyone[: len(self._values[name])]
            means[name] = math.fsum(part) / len(part)  # rounded once: no matter which process had which sample
        return means

    def _add(self, name: str, values: Iterable[float]) -> None:
        self._values.setdefault(name, []).extend(values)
