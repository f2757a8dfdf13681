"""Frozen Video-LLMs: a network with what turns frames and a question into its inputs."""

from cacovid_kernels.video_models.base import VideoModel, read_config
from cacovid_kernels.video_models.llava_onevision import (
    LlavaOneVision,
    TinyGeometry,
    load_llava_onevision,
    tiny_model,
)
from cacovid_kernels.video_models.processed import ProcessedModel, load_processed

__all__ = [
    "LlavaOneVision",
    "ProcessedModel",
    "TinyGeometry",
    "VideoModel",
    "load_llava_onevision",
    "load_model",
    "tiny_model",
]


def load_model(name: str) -> VideoModel:
    """Load a checkpoint of any family, from a folder in the layout of Hugging Face or by its hub name.

    LLaVA-OneVision needs no torchvision; the processors of the other families do.

    Raises:
        UserError: there is no such model, or its family is unknown.
    """
    if read_config(name).model_type == "llava_onevision":
        return load_llava_onevision(name)
    return load_processed(name)
