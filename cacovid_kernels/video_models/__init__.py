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

    Args:
        name: folder or hub name. LLaVA-OneVision needs no torchvision; the processors of the other families do.

    Returns:
        The model in evaluation mode, in the dtype it is stored in, on the CPU, with its `inputs(frames, question)`.

    Raises:
        UserError: there is no such model, its family is unknown, or its processor lacks a package.

    Example:
        >>> import numpy as np
        >>> from cacovid_kernels.demo.world import MODEL
        >>> from cacovid_kernels.video_models import load_model
        >>> model = load_model(str(MODEL))
        >>> inputs = model.inputs(np.zeros((8, 48, 48, 3), np.uint8), "which shape is red")
        >>> inputs["pixel_values_videos"].shape
        torch.Size([1, 8, 3, 48, 48])
    """
    with loading(name):
        kind = AutoConfig.from_pretrained(name).model_type
    return load_llava_onevision(name) if kind == "llava_onevision" else load_processed(name)
