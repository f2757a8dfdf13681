"""What the demo writes: kept_tokens.png, report.html and selection.json, all or nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch
import transformers

import cacovid_kernels
from cacovid_kernels.errors import UserError
from cacovid_kernels.viz import plot_selection, report

if TYPE_CHECKING:
    from cacovid_kernels.demo.pipeline import Result


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder whose files move to `out` when the block succeeds; otherwise nothing is left behind.

    Raises:
        UserError: `out` is a file or nothing can be written there; raised before the block runs.
    """
    try:
        # On the file system of `out`, so that moving a file is one atomic step.
        home = next(place for place in (out, *out.absolute().parents) if place.exists())
        if not home.is_dir():
            raise UserError(f"--out: {home} is a file; it must be a folder. Choose another name.")
        folder = Path(tempfile.mkdtemp(prefix=".cacovid-", dir=home))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}. Choose another folder.") from None
    try:
        yield folder
        _publish(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        if (out / file.name).is_dir():
            raise UserError(f"--out: {out / file.name} is a folder, a file goes there. Choose another one.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(file, out / file.name)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}. Choose another folder.") from None


def write_picture(result: Result, path: Path) -> None:
    """Draw the kept tokens of every frame over its score heat."""
    title, selection = None, result.selection
    if not result.options.is_random:
        full, short = (result.answers[run] for run in ("full", "compressed"))
        kept, total = sum(selection.lengths), selection.num_tokens
        title = f"{result.scene.question.rstrip('?')}?  {full}, from all {total:,} tokens;  {short}, from {kept:,}"
    frames, times = result.shown
    picture = plot_selection(frames, selection, result.token_scores, timestamps=times, title=title)
    picture.save(path, optimize=True)


def write_page(result: Result, path: Path) -> None:
    """Write the page on which the selection can be explored in a browser."""
    selection, scene, answers = result.selection, result.scene, None
    if not result.options.is_random:
        answers = {
            f"From all {selection.num_tokens:,} video tokens": result.answers["full"],
            f"From {sum(selection.lengths):,} kept": result.answers["compressed"],
        }
        answers |= {"Right answer": scene.truth} if scene.truth else {}
    frames, times = result.shown
    page = report(
        frames,
        selection,
        result.token_scores,
        timestamps=times,
        title=f"Kept video tokens of {result.clip.name}",
        question=scene.question,
        answers=answers,
    )
    path.write_text(page, encoding="utf-8")


def write_json(result: Result, path: Path) -> None:
    """Write everything needed to repeat or to judge the selection."""
    text = json.dumps(_record(result), indent=1, allow_nan=False)
    text = re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def _record(result: Result) -> dict[str, Any]:
    selection, options, clip = result.selection, result.options, result.clip
    frames, rows, columns = selection.grid_thw[0]
    per_frame = rows * columns
    kept: list[list[int]] = [[] for _ in range(frames)]
    for index in selection.indices.tolist():
        kept[index // per_frame].append(index % per_frame)
    scores = result.token_scores.double()
    return {
        "versions": {
            "cacovid_kernels": cacovid_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "av": av.__version__,
        },
        "video": {
            "name": clip.name,
            "seconds": round(clip.duration, 3),
            "frames": clip.available,
            "sampled_seconds": [round(second, 3) for second in clip.timestamps],
        },
        "question": result.scene.question,
        "answers": {**result.answers, "right": result.scene.truth},
        "model": {"name": options.model_name, "random": options.is_random, "seed": options.seed},
        "policy": str(options.policy)
        if options.policy
        else "of the procedural world"
        if options.in_world
        else "random",
        "grid_thw": [frames, rows, columns],
        "keep_ratio": options.keep_ratio,
        "importance_ratio": options.importance_ratio,
        "max_frame_ratio": options.max_frame_ratio,
        "video_tokens": {"full": selection.num_tokens, "compressed": sum(selection.lengths)},
        "prompt_tokens": result.prompt_tokens,
        "frame_counts": selection.frame_counts.tolist(),
        "frame_scores": [float(f"{score:.6g}") for score in result.frame_scores.tolist()],
        "token_scores": {
            "min": scores.min().item(),
            "mean": scores.mean().item(),
            "max": scores.max().item(),
            "mean_kept": scores[selection.indices.cpu()].mean().item(),
        },
        "kept": kept,
        "generated_tokens": {run: tokens.tolist() for run, tokens in result.generated.items()},
        "largest_logit_difference": result.agreement.largest,
    }
