"""Video-LLMs on fewer video tokens as the model `cacovid` of lmms-eval."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point of the group `lmms_eval.models` registers.

    lmms-eval calls it at every start, whatever model runs: nothing heavy, and nothing optional, is imported here.

    Returns:
        A `ModelManifest` of lmms-eval: the name `cacovid`, and the path of the class that serves it.

    Example:
        >>> from cacovid_kernels.integrations.lmms_eval import manifest
        >>> def served():
        ...     return manifest().chat_class_path
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cacovid", chat_class_path=f"{__name__}.model.Cacovid")
