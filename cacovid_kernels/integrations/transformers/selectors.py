"""From a policy, a compressor or a function of embeddings to the tokens that stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels import compressors
from cacovid_kernels.integrations.transformers.prompt import OP, Prompt
from cacovid_kernels.ops._checks import Grid, check_choice, parse_budget
from cacovid_kernels.ops.select import select_tokens, topk_tokens
from cacovid_kernels.policy import CompressionPolicy, PolicyScores

_OF_WHOLE_VIDEOS = (compressors.divprune, compressors.evs, compressors.vidcom2)
_OTHERS = (
    (compressors.fastv, "keys of the language model, which has not run yet"),
    (compressors.density_peaks, "a number of tokens per frame, not per video"),
)

# `order` is none of them: features are stored in the order of the prompt.
_OPTIONS = {"frames": ("importance_ratio", "max_frame_ratio", "fill", "mode", "check"), "video": ("check",)}

Selector = CompressionPolicy | Callable[..., Any]


def check_selector(
    selector: Any, keep_ratio: float | None, num_tokens: Any, budget: str | None, options: dict[str, Any]
) -> None:
    """What can be refused before a video is seen."""
    function = _plain(selector)
    if not callable(selector):
        raise TypeError(
            f"{OP}: selector is a {type(selector).__name__}, it must be a CompressionPolicy, one of "
            f"{[f.__name__ for f in _OF_WHOLE_VIDEOS]}, or a function of (embeddings [N, D], grid_thw) to scores [N]."
        )
    for other, need in _OTHERS:
        if function is other:
            names = [f.__name__ for f in _OF_WHOLE_VIDEOS]
            raise ValueError(f"{OP}: {other.__name__} needs {need}. Pass one of {names}.")
    check_options(selector, keep_ratio, num_tokens, budget, options)


def check_options(
    selector: Any, keep_ratio: float | None, num_tokens: Any, budget: str | None, options: dict[str, Any]
) -> None:
    """Counts and options of a selector; None stands for scores of the language model."""
    if budget is not None:
        check_choice(OP, "budget", budget, ("frames", "video"))
    if _is_compressor(selector):
        known: tuple[str, ...] = ()
        options = options if budget is None else {**options, "budget": budget}
    else:
        known = _OPTIONS[_budget_of(selector, budget)]
    for name in options:
        if name not in known:
            raise ValueError(f"{OP}: this selector takes no {name}; its options are {list(known)}. Leave it out.")
    parse_budget(OP, ((1, 1, 2**20),), keep_ratio, num_tokens if num_tokens is None else 1, 1.0, None, False)


def check_counts(prompt: Prompt, keep_ratio: float | None, num_tokens: Any) -> list[int]:
    """Tokens that each video keeps."""
    return parse_budget(OP, prompt.grid_thw, keep_ratio, num_tokens, 1.0, None, False).num_keep


@torch.no_grad()
def choose(
    selector: Any,
    prompt: Prompt,
    keep_ratio: float | None,
    num_tokens: Any,
    budget: str | None,
    options: dict[str, Any],
    scores: Tensor | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Positions `[K]` among the N video tokens, ascending, and how many of each video.

    `scores` `[N]` of the language model stand in for a selector that is None.
    """
    grid = prompt.grid_thw
    if not grid:  # images alone
        return prompt.tokens, ()
    counts = {"keep_ratio": keep_ratio, "num_tokens": num_tokens}
    kept = check_counts(prompt, keep_ratio, num_tokens)
    frames = None
    if _is_compressor(selector):
        return _compress(selector, prompt.video_embeds, grid, kept), tuple(kept)
    if isinstance(selector, CompressionPolicy):
        found: PolicyScores = _policy_scores(selector, prompt)
        scores, frames = found.tokens, found.frames
    elif scores is None:
        scores = _call(selector, prompt)
    if "check" not in options:
        odd = sum(int(x.isnan().sum()) for x in (scores, frames) if x is not None)
        if odd:
            raise ValueError(f"{OP}: {odd} scores are NaN. Clean them, or pass check='flag', which ranks them last.")
    if _budget_of(selector, budget) == "frames":
        selection = select_tokens(scores, frames, grid, **counts, **options)
    else:
        selection = topk_tokens(scores, grid, **counts, **options)
    return selection.indices, selection.lengths


def _plain(selector: Any) -> Any:
    """The function itself of a `functools.partial`."""
    return selector.func if isinstance(selector, partial) else selector


def _is_compressor(selector: Any) -> bool:
    return any(_plain(selector) is function for function in _OF_WHOLE_VIDEOS)


def _budget_of(selector: Any, budget: str | None) -> str:
    return budget or ("frames" if isinstance(selector, CompressionPolicy) else "video")


def _compress(selector: Any, embeds: Tensor, grid: Grid, kept: list[int]) -> Tensor:
    first, parts = 0, []
    for (t, h, w), k in zip(grid, kept, strict=True):
        if t == 1 and _plain(selector) is compressors.evs:
            raise ValueError(f"{OP}: evs compares frames, and the video {(t, h, w)} has one. Pass divprune.")
        video = embeds[first : first + t * h * w].view(t, h * w, -1)
        parts.append(selector(video, k).sort().values + first)
        first += t * h * w
    return torch.cat(parts)


def _policy_scores(policy: CompressionPolicy, prompt: Prompt) -> PolicyScores:
    width = prompt.inputs_embeds.shape[-1]
    if policy.config.hidden_size != width:
        raise ValueError(
            f"{OP}: the policy has hidden_size={policy.config.hidden_size}, the model {width}. "
            f"Pass the policy of this model."
        )
    # Without padding no mask: with one, attention on a GPU has only its slower kernels.
    padded = min(prompt.lengths) < prompt.input_ids.shape[1]
    return policy(
        prompt.inputs_embeds,
        video_mask=prompt.video_mask,
        attention_mask=prompt.attention_mask if padded else None,
        grid_thw=prompt.grid_thw,
    )


def _call(selector: Callable[..., Any], prompt: Prompt) -> Tensor:
    """Scores `[N]` of a function that sees the videos of one prompt at a time."""
    embeds, first, parts = prompt.video_embeds, 0, []
    for row in sorted(set(prompt.rows)):
        grid = [video for video, of in zip(prompt.grid_thw, prompt.rows, strict=True) if of == row]
        count = sum(t * h * w for t, h, w in grid)
        scores = selector(embeds[first : first + count], grid)
        if not isinstance(scores, Tensor) or scores.numel() != count:
            found = f"{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{OP}: the selector gave {found} for row {row}, it must give one score for each of its {count} "
                f"video tokens."
            )
        parts.append(scores.reshape(-1))
        first += count
    return torch.cat(parts)
