"""Budget, per-frame top-k and uniform fill of one video."""

from __future__ import annotations

import pytest
import torch
from baselines.select import CAP, IMPORTANCE, KEEP, P, fastest_torch, published_formula, vectorised_torch
from torch import Tensor

import cacovid_kernels as ck

compiled_torch = torch.compile(vectorised_torch, dynamic=False)


def ours(token: Tensor, frame: Tensor) -> Tensor:
    return ck.select_tokens(token, frame, keep_ratio=KEEP, importance_ratio=IMPORTANCE, max_frame_ratio=CAP).indices


CONTESTANTS = {
    "ours": ours,
    "fastest torch": fastest_torch,
    "torch without host reads": vectorised_torch,
    "torch.compile of it": compiled_torch,
    "published formula": published_formula,
}


@pytest.mark.parametrize(("frames", "target"), [(32, 8), (128, 15), (768, 15)])
@pytest.mark.parametrize("contestant", CONTESTANTS)
def bench_select(race, frames, target, contestant):
    generator = torch.Generator().manual_seed(frames)
    inputs = [
        (torch.randn(frames, P, generator=generator), torch.randn(frames, generator=generator)) for _ in range(200)
    ]
    kept, found = ours(*inputs[0]), CONTESTANTS[contestant](*inputs[0])
    if contestant in ("published formula", "torch.compile of it"):
        # The former merges close scores in its softmax, the latter rounds the linspace of the fill otherwise.
        assert len(set(kept.tolist()) ^ set(found.tolist())) <= kept.numel() / 100
    else:
        assert torch.equal(kept, found)
    race(f"select {frames} x {P}, keep 10%", contestant, CONTESTANTS[contestant], inputs, {"fastest torch": target})


@pytest.mark.parametrize("contestant", ["ours", "torch.topk"])
@pytest.mark.parametrize(("rows", "length"), [(32, 196), (1, 6272), (1, 100352)])
def bench_segmented_topk(race, rows, length, contestant):
    k = length // 10
    generator = torch.Generator().manual_seed(rows)
    inputs = [(torch.randn(rows, length, generator=generator),) for _ in range(200 if length < 10000 else 20)]
    calls = {"ours": lambda x: ck.segmented_topk(x, k), "torch.topk": lambda x: x.topk(k, sorted=False)}
    race(f"top-k {rows} x {length}, k={k}", contestant, calls[contestant], inputs)
