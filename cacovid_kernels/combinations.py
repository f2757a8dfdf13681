"""What a batch of sampled combinations is: which tokens and frames each of them holds, and how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cacovid_kernels._numbers import numbers_on
from cacovid_kernels.ops._packed_masks import pack_masks
from cacovid_kernels.selection import Selection, status_of_videos


def _mask(indices: Tensor, size: int) -> Tensor:
    """`[S, size]` bool from `[S, K]` positions, of which -1 marks nothing."""
    mask = torch.zeros(indices.shape[0], size + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, torch.where(indices < 0, size, indices), True)[:, :size]


@dataclass(eq=False)
class Combinations:
    """Combinations of video tokens and of frames, sampled for policy optimisation.

    Row 0 of each kind is no sample but the plain top-k; its log-probabilities are 0.

    Attributes:
        indices: `[G, K]` int64, flat positions in the packed token axis, ascending; -1 where a frame has fewer
            candidates than it should give (`Status.SHORT`).
        groups: `[G, F]` int64, the group that was drawn from each frame; -1 in row 0.
        log_prob: `[G, F]` float32, ln of the probability of that group and of the ordered draw inside it.
        frame_indices: `[Gf, KF]` int64, flat positions in the packed frame axis, ascending, -1 as above.
        frame_log_prob: `[Gf, B]` float32, ln of the probability of the ordered draw of each video's frames.
        frame_status: `[F]` int32, bits of `Status` of every frame's token scores.
        frame_draw_status: `[B]` int32, bits of `Status` of every video's frame scores; empty if none were asked for.
        lengths: tokens of one combination per video, known on the host; they sum to K.
        frame_lengths: frames of one frame combination per video; they sum to KF.
        grid_thw: frames, rows and columns per video.
    """

    indices: Tensor
    groups: Tensor
    log_prob: Tensor
    frame_indices: Tensor
    frame_log_prob: Tensor
    frame_status: Tensor
    frame_draw_status: Tensor
    lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]
    grid_thw: tuple[tuple[int, int, int], ...]

    @property
    def status(self) -> Tensor:
        """`[B]` int32, bits of `Status` per video, of token and frame scores together."""
        status = status_of_videos(self.frame_status, self.grid_thw)
        return status | self.frame_draw_status if self.frame_indices.shape[0] else status

    def mask(self) -> Tensor:
        """`[G, N]` bool over the packed token axis: true where a combination holds the token."""
        return _mask(self.indices, self._tokens)

    def frame_mask(self) -> Tensor:
        """`[Gf, F]` bool over the packed frame axis: true where a frame combination holds the frame."""
        return _mask(self.frame_indices, self._frames)

    def packed_mask(self) -> Tensor:
        """`[G, ceil(N / 32)]` int32, the bits of `mask()` as the policy loss reads them, without making it."""
        return pack_masks(indices=self.indices, num_tokens=self._tokens)

    def packed_frame_mask(self) -> Tensor:
        """`[Gf, ceil(F / 32)]` int32, the bits of `frame_mask()`."""
        return pack_masks(indices=self.frame_indices, num_tokens=self._frames)

    @property
    def _tokens(self) -> int:
        return sum(t * h * w for t, h, w in self.grid_thw)

    @property
    def _frames(self) -> int:
        return sum(t for t, _, _ in self.grid_thw)

    def selection(self, row: int) -> Selection:
        """One combination as a `Selection`, to gather or repack with."""
        counts = [k // t for k, (t, _, _) in zip(self.lengths, self.grid_thw, strict=True) for _ in range(t)]
        frame_counts = numbers_on(self.indices.device, counts, torch.int64)
        return Selection(self.indices[row], frame_counts, self.frame_status, self.lengths, self.grid_thw)
