"""Any family by the processor of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from cacovid_kernels.errors import UserError, refusing
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.integrations.transformers.tiles import TiledAdapter
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
        for mark in (getattr(self.processor, name, None) for name in ("image_token", "video_token")):
            if mark and mark in question:
                raise UserError(f"question: it must not contain {mark}. Leave the placeholder out.")
        times = [float(i) for i in range(len(frames))] if timestamps is None else timestamps
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": [metadata(times)]},
        )
        found = dict(inputs.to(self.network.device, self.network.dtype))
        if isinstance(adapter_of(self.network), TiledAdapter):  # which takes a single tile for an image
            found["visuals"] = [("video", len(frames))]
        return found


def metadata(timestamps: Sequence[float], duration: float | None = None) -> dict[str, Any]:
    """What processors want to know of a video whose frames have been chosen.

    Args:
        timestamps: T times in seconds from the first frame, ascending.
        duration: seconds; by default the last frame lasts as long as the others.
    """
    last = timestamps[-1]
    if duration is None:
        duration = last + (last / (len(timestamps) - 1) if last > 0 else 1.0)
    # As frames of a finer video, one every millisecond.
    indices = [round(1000 * time) for time in timestamps]
    total = max(round(1000 * duration), indices[-1] + 1)
    return {"total_num_frames": total, "fps": 1000.0, "duration": duration, "frames_indices": indices}


def load_processed(name: str) -> ProcessedModel:
    """Load a checkpoint of any family with its processor, from a folder or by its hub name.

    Raises:
        UserError: there is no such model, its family is unknown, or its processor lacks a package.
    """
    with loading(name):
        network = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
        processor = transformers.AutoProcessor.from_pretrained(name)
    with refusing(f"model: {name}", ValueError, RuntimeError):
        adapter_of(network)
    return ProcessedModel(network, processor)
