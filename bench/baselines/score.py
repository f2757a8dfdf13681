"""Row statistics and scores of videos with frames of 14 x 14 tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import cacovid_kernels as ck

ROWS = COLUMNS = 14
EPS = 1e-6


def published_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the RMSNorm, mean over rows and columns: the two reads of the published forward."""
    rrms = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return rrms.squeeze(-1), x.reshape(-1, ROWS, COLUMNS, x.shape[-1]).mean(dim=(1, 2))


def plain_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a float32 copy, over the friendlier shape."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return torch.rsqrt(norms.square() / x.shape[-1] + EPS), x.view(-1, ROWS * COLUMNS, x.shape[-1]).mean(1)


class Network:
    """Both heads with random weights, and the ways to run them."""

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(0)
        self.token_head, self.frame_head = (ck.PolicyHead(size).to(dtype) for _ in range(2))
        for p in [*self.token_head.parameters(), *self.frame_head.parameters()]:
            torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1)
        self.token_head, self.frame_head = self.token_head.to(device), self.frame_head.to(device)
        self.weight = (torch.rand(size) + 0.5).to(device, dtype)

    def _logits(self, head: ck.PolicyHead, rows: Tensor) -> Tensor:
        wide = rows.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return head(self.weight * normal.to(rows.dtype)).float().diff(dim=-1).squeeze(-1)

    def ours(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = [(x.shape[0] // (ROWS * COLUMNS), ROWS, COLUMNS)]
        return ck.score_tokens(x, self.token_head, self.frame_head, grid, norm_weight=self.weight, eps=EPS)

    def ours_tokens(self, x: Tensor) -> Tensor:
        return ck.score_tokens(x, self.token_head, norm_weight=self.weight, eps=EPS)[0]

    def published(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frames = x.reshape(-1, ROWS, COLUMNS, x.shape[-1]).mean(dim=(1, 2))
        return self._logits(self.token_head, x), self._logits(self.frame_head, frames)

    def published_tokens(self, x: Tensor) -> Tensor:
        return self._logits(self.token_head, x)

    def products(self, x: Tensor) -> Tensor:
        """The matrix products of the token head alone: what no way of running it can save."""
        for layer in self.token_head.linears:
            x = F.linear(x, layer.weight)
        return x

    def operations(self, rows: int) -> int:
        """Multiplications and additions of those products."""
        return 2 * rows * sum(layer.weight.numel() for layer in self.token_head.linears)
