"""What every training process needs, imported once in the server that forks them."""

from __future__ import annotations

import torch
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from cacovid_kernels.training.trainer import Trainer

# A pool of threads would not survive the fork, and bits depend on how many there are.
torch.set_num_threads(1)

__all__ = ["LlavaOnevisionForConditionalGeneration", "PreTrainedTokenizerFast", "Trainer"]
