"""Training a compression policy: combinations of tokens, rewarded by a frozen model's answers."""

from __future__ import annotations

from cacovid_kernels.samples import BadRowError, Sample
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.data import FileRows
from cacovid_kernels.training.log import read_log
from cacovid_kernels.training.rewards import Attempts, Reward
from cacovid_kernels.training.trainer import Trainer

__all__ = ["Attempts", "BadRowError", "FileRows", "Reward", "Sample", "TrainConfig", "Trainer", "read_log"]
