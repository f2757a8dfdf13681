"""`python -m cacovid_kernels train`: read the configuration, load the frozen model and the data, train."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils import logging

from cacovid_kernels.demo.world import MODEL
from cacovid_kernels.demo.world.rows import WORLD, WorldRows
from cacovid_kernels.samples import Rows
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.data import FileRows
from cacovid_kernels.training.trainer import Trainer
from cacovid_kernels.video_models import load_model


def run_train(path: Path) -> int:
    """Train as a configuration file says; 0 when it is done, 1 when a number of it was none.

    Raises:
        UserError: the configuration, the model, the data or the policy cannot be used.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = TrainConfig.from_file(path)
    if config.data == WORLD:
        rows: Rows = WorldRows()
    else:
        rows = FileRows(config.data, video_root=config.video_root, num_frames=config.num_frames)
    model = load_model(str(MODEL) if config.model == WORLD else config.model)
    trainer = Trainer(config, model, rows)
    try:
        trainer.train()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if trainer.accelerator.is_main_process:
        print(f"wrote {config.output}/policy after {trainer.steps} steps; bad rows: {len(trainer.skipped.reasons)}")
    return 0
