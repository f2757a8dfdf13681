"""One bidirectional decoder layer with the parameter names of Qwen2 (optionally Qwen3), in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cacovid_kernels.ops.score import rms_norm


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a compression policy; the fields carry the names of a language model's `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True  # Qwen2; Qwen3 has none
    qk_norm: bool = False  # Qwen3: RMSNorm on the query and key heads

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"PolicyConfig: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.hidden_size < 16:
            raise ValueError(f"PolicyConfig: hidden_size={self.hidden_size} must be >= 16 (the heads end in D/16).")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PolicyConfig:
        """Read a flat config or the language model's part of a full model's config."""
        config = config.get("text_config") or config
        # transformers >= 5 keeps the base of the rotary embedding in a group of its own.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        values = {**rope, **config}
        known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"PolicyConfig: config must hold {', '.join(missing)} (it holds {sorted(config)}).")
        # With one position per token, the multimodal kinds reduce to the plain rotary embedding.
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"PolicyConfig: rope_type={rope_type!r} must be 'default' or 'mrope'.")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"PolicyConfig: hidden_act={config['hidden_act']!r} must be 'silu'.")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RMSNorm(nn.Module):
    """Root mean square norm along the last axis."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, L, head_dim]` of the half-split rotary embedding."""
    # Computed per call in float32: a module's buffer would be rounded by `policy.to(torch.bfloat16)`.
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (steps / head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies  # [B, 1, L, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention of every token to every unmasked token."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2)  # [B, H, L, head_dim]
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2)  # [B, H_kv, L, head_dim]
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        # Repeated rather than enable_gqa: with a mask the latter falls back to an L x L matrix on a GPU.
        k = _rotate(k, *rotary).repeat_interleave(self.groups, dim=1)
        v = v.repeat_interleave(self.groups, dim=1)
        out = F.scaled_dot_product_attention(_rotate(q, *rotary), k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


ROWS = 2048  # tokens that pass through the wide part at once where nothing has to be kept for a gradient


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), `[B, L, D]` -> `[B, L, D]`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[1] <= ROWS:
            return self._wide(x)
        # Three matrices of the intermediate size for a whole video would be the most memory of a compressed prompt.
        return torch.cat([self._wide(part) for part in x.split(ROWS, dim=1)], 1)

    def _wide(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each with a residual; `[B, L, D]` -> `[B, L, D]`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x))
