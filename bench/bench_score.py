"""Policy scores of one 7B-sized video: 32 frames of 14 x 14 tokens, 3584 channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cacovid_kernels as ck
from cacovid_kernels.ops import score

GRID = [(32, 14, 14)]
SIZE = 3584
EPS = 1e-6


def hidden_states(dtype: torch.dtype, count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32 * 196, SIZE, generator=generator).to(dtype),) for _ in range(count)]


# ---- row norms and frame means ------------------------------------------------------------------


def published_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the RMSNorm, mean over rows and columns: the two reads of the published forward."""
    rrms = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return rrms, x.reshape(32, 14, 14, SIZE).mean(dim=(1, 2))


def plain_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a float32 copy, over the friendlier shape."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return torch.rsqrt(norms.square() / SIZE + EPS), x.view(32, 196, SIZE).mean(1)


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


class Network:
    """Both heads with random weights, and the ways to run them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.token_head, self.frame_head = (ck.PolicyHead(SIZE).bfloat16() for _ in range(2))
        for p in [*self.token_head.parameters(), *self.frame_head.parameters()]:
            torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1)
        self.weight = (torch.rand(SIZE) + 0.5).bfloat16()

    def ours(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return ck.score_tokens(x, self.token_head, self.frame_head, GRID, norm_weight=self.weight, eps=EPS)

    def published(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def logits(head: ck.PolicyHead, rows: Tensor) -> Tensor:
            wide = rows.to(torch.float32)
            normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
            return head(self.weight * normal.to(rows.dtype)).float().diff(dim=-1).squeeze(-1)

        return logits(self.token_head, x), logits(self.frame_head, x.reshape(32, 14, 14, SIZE).mean(dim=(1, 2)))

    def products(self, x: Tensor) -> Tensor:
        """The matrix products of the token head alone: what no way of running it can save."""
        for layer in self.token_head.linears:
            x = F.linear(x, layer.weight)
        return x


@pytest.fixture(scope="module")
def network():
    with torch.no_grad():
        yield Network()


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
