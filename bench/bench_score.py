"""Policy scores of one 7B-sized video: 32 frames of 14 x 14 tokens, 3584 channels."""

from __future__ import annotations

import pytest
import torch
from baselines.score import EPS, Network, plain_statistics, published_statistics
from torch import Tensor

from cacovid_kernels.ops import score

SIZE = 3584


def hidden_states(dtype: torch.dtype, count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32 * 196, SIZE, generator=generator).to(dtype),) for _ in range(count)]


# ---- row norms and frame means ------------------------------------------------------------------


STATISTICS = {
    "ours": lambda x: score._frame_pool(x, [32, 14, 14], EPS),
    "plain torch": plain_statistics,
    "torch.compile of it": torch.compile(plain_statistics, dynamic=False),
    "published formula": published_statistics,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("contestant", STATISTICS)
def bench_frame_pool(race, dtype, contestant):
    targets = {"published formula": 15}
    call = STATISTICS[contestant]
    race(
        f"frame means, row norms {dtype}".replace("torch.", ""),
        contestant,
        call,
        hidden_states(dtype, 3),
        targets,
    )


# ---- token and frame scores ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    with torch.no_grad():
        yield Network(SIZE)


@pytest.mark.parametrize("contestant", ["ours", "published formula", "torch.compile of it", "products alone"])
def bench_score_tokens(race, network, contestant):
    calls = {
        "ours": network.ours,
        "published formula": network.published,
        "torch.compile of it": torch.compile(network.published, dynamic=False),
        "products alone": network.products,
    }
    inputs = hidden_states(torch.bfloat16, 3)
    targets = {"published formula": 1.35, "torch.compile of it": 1.05, "products alone": 0.82}
    with torch.no_grad():
        if contestant != "products alone":
            for mine, theirs in zip(calls[contestant](*inputs[0]), network.published(*inputs[0]), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)
        race("scores 6272 x 3584 bf16, both heads", contestant, calls[contestant], inputs, targets, seconds=1.5)
