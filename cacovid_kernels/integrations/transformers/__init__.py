"""Video-LLMs of Hugging Face transformers on fewer video tokens, without patching a class."""

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual
from cacovid_kernels.integrations.transformers.context import Compression, compress
from cacovid_kernels.integrations.transformers.prune import prune_inputs
from cacovid_kernels.integrations.transformers.registry import register_adapter
from cacovid_kernels.integrations.transformers.turns import next_turn

__all__ = ["Adapter", "Compression", "Visual", "compress", "next_turn", "prune_inputs", "register_adapter"]
