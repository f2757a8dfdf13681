"""Importing this makes torchvision importable beside a build of torch that its compiled operators do not fit.

On PyPI torchvision is built for CUDA, so its library does not load beside a torch for the CPU, and its import stops at
the first operator whose fake it registers. Processors use the transforms alone, which are Python: a schema without a
kernel is enough for them.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch

OPERATORS = ("nms", "qnms")  # whose fakes torchvision registers unasked


def _loads(package: list[str]) -> bool:
    library = PathFinder.find_spec("_C", package)  # as torchvision finds it
    try:
        torch.ops.load_library(library.origin if library else "")
    except OSError:
        return False
    return True


_found = find_spec("torchvision")
if _found and not _loads(_found.submodule_search_locations):
    for _name in OPERATORS:
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
