"""A world in which the right tokens are plain to see: one bright cell per frame, and a reward for keeping it."""

from __future__ import annotations

import numpy as np
import torch

from cacovid_kernels.samples import Sample
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.rewards import Attempts, Reward
from cacovid_kernels.video_models import LlavaOneVision, TinyGeometry, tiny_model

FRAMES, SIDE, CELL = 4, 4, 28
GEOMETRY = TinyGeometry(image_size=SIDE * CELL, patch_size=14, vision_width=32, vision_layers=1, width=64, layers=2)


def toy_model(seed: int = 0) -> LlavaOneVision:
    """A random model of 4 x 4 tokens per frame."""
    return tiny_model(GEOMETRY, seed)


def bright_cells(index: int) -> np.ndarray:
    """`[FRAMES]`: which cell of every frame of video `index` is bright."""
    return np.random.default_rng(index).integers(0, SIDE * SIDE, FRAMES)


class ToyRows:
    """Videos of grey noise with one bright cell per frame."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int, /) -> Sample:
        frames = np.random.default_rng(1000 + i).integers(0, 60, (FRAMES, SIDE * CELL, SIDE * CELL, 3), dtype=np.uint8)
        for t, cell in enumerate(bright_cells(i)):
            row, column = divmod(int(cell), SIDE)
            frames[t, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] += 190
        return Sample(f"toy {i}", frames, "where?", "b" if i % 2 else "a")


def keeps_bright(attempts: Attempts) -> torch.Tensor:
    """`[G]`: share of the video's bright cells that a combination keeps."""
    cells = bright_cells(int(attempts.sample.name.split()[1])) + np.arange(FRAMES) * SIDE * SIDE
    hits = (attempts.kept[:, :, None] == torch.from_numpy(cells)).any(1)
    return hits.float().mean(1)


BRIGHT = Reward(keeps_bright, keeps_bright)


def toy_config(output: object, **changes: object) -> TrainConfig:
    """Small and quick: three tokens of sixteen per frame."""
    values = {
        "output": str(output), "sampler": "combinations",
        "keep_ratio": 0.125, "min_keep_ratio": 0.125, "max_keep_ratio": 0.125,
        "num_token": 11, "num_frame": 4, "num_content": 1, "frame_ratio": 0.25, "num_iterations": 2,
        "learning_rate": 1e-3, "decoder_lr_scale": 0.3, "batch_size": 2, "max_steps": 6, "save_every": 2, "seed": 3,
    }  # fmt: skip
    return TrainConfig.from_dict({**values, **changes})
