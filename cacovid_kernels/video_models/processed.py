"""Any family by the processor of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from cacovid_kernels.errors import UserError
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.video_models.base import loading


@dataclass(frozen=True)
class ProcessedModel:
    """A Video-LLM whose own processor and chat template write its prompts."""

    network: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def inputs(self, frames: np.ndarray, question: str, timestamps: Sequence[float] | None = None) -> dict[str, Any]:
        """As `VideoModel.inputs`; without times the frames are taken to be a second apart."""
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": [metadata(len(frames), timestamps)]},
        )
        return dict(inputs.to(self.network.device, self.network.dtype))


def metadata(num_frames: int, timestamps: Sequence[float] | None) -> dict[str, Any]:
    """What processors want to know of a video whose frames have been chosen: times as frames of a finer video."""
    times = np.arange(num_frames, dtype=float) if timestamps is None else np.asarray(timestamps, dtype=float)
    rate = 1000.0  # whole milliseconds
    indices = [round(time * rate) for time in times]
    return {
        "total_num_frames": indices[-1] + 1,
        "fps": rate,
        "duration": (indices[-1] + 1) / rate,
        "frames_indices": indices,
    }


def load_processed(name: str) -> ProcessedModel:
    """Load a checkpoint of any family with its processor, from a folder or by its hub name.

    Raises:
        UserError: there is no such model, its family is unknown, or its processor lacks a package.
    """
    with loading(name):
        network = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
        processor = transformers.AutoProcessor.from_pretrained(name)
    try:
        adapter_of(network)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model: {name}: {error}") from None
    return ProcessedModel(network, processor)
