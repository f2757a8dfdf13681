"""Rows of a data file, and what happens to rows that are bad."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from cacovid_kernels.errors import UserError
from cacovid_kernels.samples import BadRowError, Rows, Sample

Prepared = TypeVar("Prepared")

# A row may use the names of the published data set.
_NAMES = {"question": ("question", "problem"), "answer": ("answer", "solution"), "video": ("video",)}
_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


class FileRows:
    """The rows of a JSON list or of JSON lines, their videos decoded when they are asked for.

    Args:
        path: the file; every row is a table with "video", "question" and "answer" ("problem" and "solution", with
            the answer in `<answer>` marks or without, are understood too).
        video_root: where relative video paths start; the file's folder when empty.
        num_frames: frames per video.

    Raises:
        UserError: the file is no such list.
    """

    def __init__(self, path: str | Path, *, video_root: str = "", num_frames: int = 32) -> None:
        self.path = Path(path)
        self.root = Path(video_root) if video_root else self.path.parent
        self.num_frames = num_frames
        try:
            text = self.path.read_text()
            is_list = text.lstrip().startswith("[")
            rows = json.loads(text) if is_list else [_line(line) for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"data: {self.path} cannot be read: {error}. Give a JSON list or JSON lines.") from None
        self.rows: list[Any] = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int, /) -> Sample:
        from cacovid_kernels.video import read_clip

        name, row = f"{self.path.name} row {i}", self.rows[i]
        if not isinstance(row, Mapping):
            raise BadRowError(f"{name}: must be a table of names and values, not {str(row)[:40]!r}.")
        video, question, answer = (_text(name, row, field) for field in ("video", "question", "answer"))
        marked = _ANSWER.search(answer)
        name = f"{name} ({video})"
        try:
            clip = read_clip(self.root / video, self.num_frames)
        except UserError as error:
            raise BadRowError(f"{name}: {error}") from None
        return Sample(name, clip.frames, question, marked.group(1) if marked else answer, clip.timestamps)


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # told apart, named and counted as a bad row


def _text(name: str, row: Mapping[str, Any], key: str) -> str:
    value = next((row[k] for k in _NAMES[key] if k in row), None)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"{name}: {key} must be a text, not {value!r}.")
    return value.strip()


@dataclass
class Skipped:
    """Bad rows, each named once on stderr; too many end the run."""

    limit: int
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, i: int, error: BadRowError) -> None:
        if i in self.reasons:
            return
        self.reasons[i] = str(error)
        print(f"skipped: {error}", file=sys.stderr)
        if len(self.reasons) > self.limit:
            raise UserError(
                f"data: {len(self.reasons)} bad rows, max_bad_rows={self.limit}. Mend them, or raise the limit."
            )


def order_of_epoch(rows: int, epoch: int, seed: int) -> Sequence[int]:
    """A permutation of the rows, a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def read_usable(
    rows: Rows, order: Sequence[int], place: int, skipped: Skipped, prepare: Callable[[Sample], Prepared]
) -> Prepared:
    """What `prepare` makes of the sample at a place of the order, or of the next one after it that is not bad.

    A stand-in is found from the data alone, so that a resumed run and another number of processes find the same.

    Raises:
        UserError: every row is bad, or more than the limit.
    """
    for i in range(len(order)):
        row = order[(place + i) % len(order)]
        if row in skipped.reasons:
            continue
        try:
            return prepare(rows[row])
        except BadRowError as error:
            skipped.add(row, error)
    first = next(iter(skipped.reasons.values()), "it is empty")
    raise UserError(f"data: none of the {len(order)} rows can be used: {first}")
