"""Another compressor on these ops: keep what changed since the previous frame, in thirty lines.

A token's score is one minus the cosine to the token at the same place one frame earlier; the first frame is kept
first. The exact budget, the batch of different videos, the tie rule and the compaction come with the ops.

Run: python examples/build_a_compressor.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import cacovid_kernels as ck


def frame_difference(features: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[N, D] features of one video -> [N] scores."""
    t, h, w = grid
    x = torch.nn.functional.normalize(features.reshape(t, h * w, -1).float(), dim=-1)
    change = 1 - (x[1:] * x[:-1]).sum(-1)  # [T - 1, P]
    return torch.cat([change.new_full((1, h * w), 255.0), change]).reshape(-1)


def main() -> None:
    grids = [(8, 14, 14), (3, 9, 16)]
    videos = [torch.randn(t * h * w, 64) for t, h, w in grids]
    scores = torch.cat([frame_difference(x, grid) for x, grid in zip(videos, grids, strict=True)])
    lengths = [x.shape[0] for x in videos]
    kept = ck.segmented_topk(scores, [n // 4 for n in lengths], cu_seqlens=[0, lengths[0], sum(lengths)])
    prompt = {"embeds": torch.cat(videos), "position_ids": torch.cat([torch.arange(n) for n in lengths])}
    short = ck.gather_tokens(prompt, kept)
    print({name: f"{list(x.shape)} -> {list(short[name].shape)}" for name, x in prompt.items()})


if __name__ == "__main__":
    main()
