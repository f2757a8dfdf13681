"""Processors that name the grid of every video and image: all patches in one tensor, `video_grid_thw` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cacovid_kernels.integrations.transformers.adapter import Adapter, Visual, check_axes

_ONE_CALL = "Pass ids, pixels and grids of one call of the processor."


class GriddedAdapter(Adapter):
    """Grids count patches; each side shrinks by a merge size on the way to the tokens.

    What does not fit is refused before the vision tower runs, which would take it for other frames or fail inside.
    """

    pixel_axes = ("patches", "values")
    frames_apart = False  # text stands between the frames of a video
    frames_may_touch = False  # or it may be missing

    def merges(self, model: Any, inputs: Mapping[str, Any], modality: str, count: int) -> list[int]:
        """The merge size of each of `count` grids."""
        raise NotImplementedError

    def visuals(self, model: Any, inputs: Mapping[str, Any], num_features: int) -> list[Visual]:
        return [Visual.video(grid) for grid in self.grids(model, inputs, "video")]

    def grids(self, model: Any, inputs: Mapping[str, Any], modality: str) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the tokens of every video or image."""
        name = f"{modality}_grid_thw"
        given = inputs.get(name)
        if given is None:
            raise ValueError(f"prune_inputs: inputs hold no {name}. Pass the processor's whole output.")
        check_axes(name, given, (f"{modality}s", "3"))
        found = []
        for (t, h, w), m in zip(given.tolist(), self.merges(model, inputs, modality, len(given)), strict=True):
            if min(t, h, w, m) < 1 or h % m or w % m:
                raise ValueError(
                    f"prune_inputs: {name} has the entry {(t, h, w)}, rows and columns must be positive multiples of "
                    f"the merge size {m}. Pass the processor's grids as they are."
                )
            found.append((t, h // m, w // m))
        return found

    def runs(self, inputs: Mapping[str, Any], grids: list[tuple[int, int, int]]) -> list[list[int]]:
        """Placeholders of every video that stand side by side: of each frame, or of the whole."""
        return [[h * w] * t if self.frames_apart else [t * h * w] for t, h, w in grids]

    def check_inputs(self, model: Any, inputs: Mapping[str, Any], ids: Tensor) -> None:
        types = inputs.get("mm_token_type_ids")
        if types is not None:
            check_axes("mm_token_type_ids", types, tuple(map(str, ids.shape)))
        for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            found = _runs(ids == self.token_id(model, modality))
            pixels = inputs.get(name)
            if pixels is not None:
                check_axes(name, pixels, self.pixel_axes)
                grids = self.grids(model, inputs, modality)
                patches = int(inputs[f"{modality}_grid_thw"].prod(1).sum())
                if len(pixels) != patches:
                    raise ValueError(
                        f"prune_inputs: {name} has {len(pixels)} patches, {modality}_grid_thw "
                        f"{inputs[f'{modality}_grid_thw'].tolist()} needs {patches}. {_ONE_CALL}"
                    )
                wanted = self.runs(inputs, grids) if modality == "video" else [[t * h * w] for t, h, w in grids]
                if modality == "video" and self.frames_may_touch and len(found) == len(grids):
                    wanted = [[sum(runs)] for runs in wanted]
                _check_runs(modality, found, wanted, grids)
            elif found:
                raise ValueError(
                    f"prune_inputs: the prompts have {sum(found)} {modality} placeholders, but inputs hold no {name}. "
                    f"Pass the processor's whole output, or leave them out of the text."
                )


def _check_runs(modality: str, found: list[int], wanted: list[list[int]], grids: list[tuple[int, int, int]]) -> None:
    flat = list(chain.from_iterable(wanted))
    if sum(found) != sum(flat):
        raise ValueError(
            f"prune_inputs: the prompts have {sum(found)} {modality} placeholders, the grids {grids} need {sum(flat)}. "
            f"{_ONE_CALL}"
        )
    if modality == "image":  # nothing need stand between images
        return
    if len(found) != len(flat):
        raise ValueError(
            f"prune_inputs: the prompts have {len(found)} runs of {modality} placeholders, the grids {grids} need "
            f"{len(flat)}. {_ONE_CALL}"
        )
    numbers = [number for number, runs in enumerate(wanted) for _ in runs]
    for run, (number, have, need) in enumerate(zip(numbers, found, flat, strict=True)):
        if have != need:
            raise ValueError(
                f"prune_inputs: run {run} of {modality} placeholders has {have}, {modality} {number} of the grid "
                f"{grids[number]} needs {need} there. {_ONE_CALL}"
            )


def _runs(marked: Tensor) -> list[int]:
    """How many stand side by side, run by run, in the order of the rows."""
    edges = torch.diff(F.pad(marked.int(), (1, 1))).flatten().nonzero()[:, 0]
    return (edges[1::2] - edges[::2]).tolist()
