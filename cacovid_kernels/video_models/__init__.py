"""Frozen Video-LLMs: a network with what turns frames and a question into its inputs."""

from transformers import AutoConfig

from cacovid_kernels.video_models.base import VideoModel, loading
from cacovid_kernels.video_models.llava_onevision import (
    LlavaOneVision,
    TinyGeometry,
    load_llava_onevision,
    tiny_model,
)
from cacovid_kernels.video_models.processed import ProcessedModel, load_processed

__all__ = ["LlavaOneVision", "ProcessedModel", "TinyGeometry", "VideoModel", "load_model", "tiny_model"]


def load_model(name: str) -> VideoModel:
    """Load a checkpoint of any family, from a folder in the layout of Hugging Face or by its hub name.

    LLaVA-OneVision needs no torchvision; the processors of the other families do.

    Raises:
        UserError: there is no such model, its family is unknown, or its processor lacks a package.
    """
    with loading(name):
        kind = AutoConfig.from_pretrained(name).model_type
    return load_llava_onevision(name) if kind == "llava_onevision" else load_processed(name)
