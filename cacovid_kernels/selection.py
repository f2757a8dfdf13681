"""What a selection is: which tokens of which video are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import reduce
from itertools import accumulate
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from cacovid_kernels._masks import masked_positions
from cacovid_kernels._numbers import numbers_on


class Status(IntFlag):
    """What was odd about the values of a row or video; 0 when nothing was."""

    OK = 0
    NAN = 1
    POSINF = 2
    SHORT = 4
    OUT_OF_BOUNDS = 8


def raise_if_flagged(op: str, status: Tensor, what: str, fatal: Status = ~Status.OK) -> None:
    """ValueError naming the first flagged row. Reads the status on the host: one synchronisation."""
    for row, value in enumerate(status.reshape(-1).tolist()):
        if value & fatal:
            flags = " | ".join(f.name or "" for f in Status if value & f)
            raise ValueError(f'{op}: {what} {row} has {flags} values. Clean them, or pass check="flag".')


def kept_mask(indices: Tensor, num_tokens: int) -> Tensor:
    """`[K]` flat positions -> `[N]` bool."""
    return torch.zeros(num_tokens, dtype=torch.bool, device=indices.device).scatter_(0, indices, True)


def kept_positions(indices: Tensor, lengths: Sequence[int], grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
    """`[K]` flat positions -> `[3, K]` frame, row and column in the video of each."""
    first, parts = 0, [indices.new_empty(3, 0)]
    for kept, (t, h, w) in zip(indices.split(list(lengths)), grid_thw, strict=True):
        token = kept - first
        column, line = token % w, torch.div(token, w, rounding_mode="floor")
        parts.append(torch.stack([torch.div(line, h, rounding_mode="floor"), line % h, column]))
        first += t * h * w
    return torch.cat(parts, 1)


def frames_of(indices: Tensor, lengths: Sequence[int], grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
    """`[K]` int64: the frame, counted over all videos, of every kept token."""
    sizes = {h * w for _, h, w in grid_thw}
    if len(sizes) == 1:
        return indices // sizes.pop()
    parts, token, frame = [indices.new_empty(0)], 0, 0
    for kept, (t, h, w) in zip(indices.split(list(lengths)), grid_thw, strict=True):
        parts.append((kept - token) // (h * w) + frame)
        token, frame = token + t * h * w, frame + t
    return torch.cat(parts)


def _bits_of_rows(status: Tensor) -> Tensor:
    """`[R, T]` -> `[R]`: the bits that any entry of a row has. torch has no reduction by OR."""
    return reduce(or_, ((status & flag.value).amax(1) for flag in Status if flag))


def status_of_videos(frame_status: Tensor, grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
    """`[F]` bits per frame -> `[B]` int32 bits per video, without a host read."""
    frames = [t for t, _, _ in grid_thw]
    if not frames:
        return frame_status
    if all(t == frames[0] for t in frames):
        return _bits_of_rows(frame_status.reshape(len(frames), frames[0]))
    return torch.cat([_bits_of_rows(video[None]) for video in frame_status.split(frames)])


class Layout(NamedTuple):
    """Where the kept tokens of a selection lie."""

    cu_seqlens: Tensor  # [B + 1] int32
    mask: Tensor  # [N] bool
    positions: Tensor  # [3, K] int64


@dataclass(eq=False)
class Selection:
    """Kept tokens of a batch of videos, packed along one token axis.

    Attributes:
        indices: `[K]` int64, flat positions in the packed axis, video by video; ascending unless the
            selection was made with `order="score"`.
        frame_counts: `[F]` int64, kept tokens per frame, over all videos.
        frame_status: `[F]` int32, bits of `Status` per frame: what was odd about its tokens' scores or its own.
        lengths: kept tokens per video, known on the host.
        grid_thw: frames, rows and columns per video, known on the host.
        tokens: `[K, D]` kept rows of the tokens that were given to `select_tokens`, else None.
        layout: what `select_tokens` was told to write in the same launch, else None: `mask`, `positions` and
            `cu_seqlens` then answer from it.
    """

    indices: Tensor
    frame_counts: Tensor
    frame_status: Tensor
    lengths: tuple[int, ...]
    grid_thw: tuple[tuple[int, int, int], ...]
    tokens: Tensor | None = None
    layout: Layout | None = None

    @property
    def status(self) -> Tensor:
        """`[B]` int32, bits of `Status` per video: all of its frames' bits together."""
        return status_of_videos(self.frame_status, self.grid_thw)

    @property
    def num_tokens(self) -> int:
        """Tokens before the selection, over all videos."""
        return sum(t * h * w for t, h, w in self.grid_thw)

    @property
    def cu_seqlens(self) -> Tensor:
        """`[B + 1]` int32 prefix sums of `lengths`, as variable-length attention takes them."""
        if self.layout is not None:
            return self.layout.cu_seqlens
        return numbers_on(self.indices.device, [0, *accumulate(self.lengths)], torch.int32)

    def mask(self) -> Tensor:
        """`[N]` bool over the packed token axis: true where a token is kept."""
        return self.layout.mask if self.layout is not None else kept_mask(self.indices, self.num_tokens)

    def positions(self) -> Tensor:
        """`[3, K]` int64: frame, row and column of every kept token in its video, in the order of `indices`."""
        if self.layout is not None:
            return self.layout.positions
        return kept_positions(self.indices, self.lengths, self.grid_thw)

    def padded_indices(self, side: str = "left") -> Tensor:
        """`[B, max(lengths)]` int64: the indices of each video, padded with -1 on `side` ("left" or "right")."""
        if side not in ("left", "right"):
            raise ValueError(f'Selection.padded_indices: side={side!r} must be "left" or "right".')
        longest = max(self.lengths) if self.lengths else 0
        rows = []
        for kept in self.indices.split(list(self.lengths)):
            missing = longest - kept.numel()
            pad = (missing, 0) if side == "left" else (0, missing)
            rows.append(torch.nn.functional.pad(kept, pad, value=-1))
        return torch.stack(rows) if rows else self.indices.new_empty(0, 0)

    def within(self, token_mask: Tensor) -> Selection:
        """The same selection inside longer prompts: everything that is no video token is kept too.

        Args:
            token_mask: `[L]` or `[B, L]` bool, true at the video tokens, in packed order. Each row holds
                an equal share of the videos, whole ones.

        Returns:
            A selection over the `L` (or `B * L`) positions, one entry of `lengths` per row; each row counts
            as one frame of L tokens.

        Raises:
            ValueError: the mask has another dtype or rank, or its rows cannot hold the videos. On a CPU also
                when it does not mark exactly the selection's tokens; elsewhere that would need a host read.
        """
        rows = token_mask.unsqueeze(0) if token_mask.dim() == 1 else token_mask
        if rows.dtype != torch.bool or rows.dim() != 2 or len(self.lengths) % max(rows.shape[0], 1):
            raise ValueError(
                f"Selection.within: token_mask {list(token_mask.shape)} {token_mask.dtype} must be a bool mask [L] "
                f"or [B, L] whose rows hold {len(self.lengths)} videos evenly. Mark the video tokens of each prompt."
            )
        per_row = len(self.lengths) // rows.shape[0]
        tokens = [t * h * w for t, h, w in self.grid_thw]
        dropped = [n - kept for n, kept in zip(tokens, self.lengths, strict=True)]
        lengths = tuple(rows.shape[1] - sum(dropped[b * per_row : (b + 1) * per_row]) for b in range(rows.shape[0]))
        flat = rows.reshape(-1)
        if type(flat) is Tensor and flat.device.type == "cpu" and not torch.compiler.is_compiling():
            marked = rows.sum(1).tolist()
            expected = [sum(tokens[b * per_row : (b + 1) * per_row]) for b in range(rows.shape[0])]
            if marked != expected:
                raise ValueError(
                    f"Selection.within: token_mask marks {marked} video tokens per row, grid_thw says {expected}. "
                    f"Pass the mask of the prompt that was scored."
                )
        positions = masked_positions(flat, self.num_tokens)
        keep = (~flat).scatter(0, positions.clamp(max=flat.numel() - 1)[self.indices], True)
        counts = numbers_on(flat.device, lengths, torch.int64)
        return Selection(
            indices=masked_positions(keep, sum(lengths)),
            frame_counts=counts,
            frame_status=_bits_of_rows(self.status.reshape(rows.shape[0], per_row)),
            lengths=lengths,
            grid_thw=tuple((1, 1, rows.shape[1]) for _ in lengths),
        )
