"""Qwen2.5-VL: Qwen2-VL with times in seconds among the inputs."""

from __future__ import annotations

from cacovid_kernels.integrations.transformers.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    family = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
