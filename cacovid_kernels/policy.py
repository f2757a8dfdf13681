"""The compression policy of CaCoVID: which video tokens matter for this question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cacovid_kernels._decoder import DecoderLayer, PolicyConfig, RMSNorm, rotary_tables
from cacovid_kernels._masks import masked_positions
from cacovid_kernels._prompt import check_prompt, check_whole_videos
from cacovid_kernels._safetensors import PREFIX, read_policy_tensors, write_policy_tensors
from cacovid_kernels.ops._checks import Grid, check_choice, parse_grid
from cacovid_kernels.ops.score import PolicyHead, score_tokens
from cacovid_kernels.ops.select import select_tokens, topk_tokens
from cacovid_kernels.selection import Selection

_GATE = "layers.0.mlp.gate_proj.weight"  # every language model has it; vision towers name theirs otherwise


class PolicyScores(NamedTuple):
    """What the policy says of a batch; a larger score is more worth keeping."""

    tokens: Tensor  # [N] float32, packed over all videos
    frames: Tensor  # [F] float32, packed over all videos
    modes: Tensor  # [B, 3] float32, one row per prompt


class CompressionPolicy(nn.Module):
    """One bidirectional decoder layer over text and video, then a token, a frame and a mode head.

    Args:
        config: shape of the network.

    Example:
        >>> import torch, cacovid_kernels as ck
        >>> policy = ck.CompressionPolicy(ck.PolicyConfig(32, 64, 4, 2))
        >>> video_mask = torch.arange(20)[None] < 18
        >>> scores = policy(torch.randn(1, 20, 32), video_mask=video_mask, grid_thw=[(2, 3, 3)])
        >>> scores.tokens.shape, scores.frames.shape, scores.modes.shape
        (torch.Size([18]), torch.Size([2]), torch.Size([1, 3]))

    Source: CaCoVID section 3 (arXiv 2602.01649); the published class of the same name, whose parameter
    names this one keeps.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([DecoderLayer(config)])
        self.layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.token_compress = PolicyHead(config.hidden_size)
        self.frame_compress = PolicyHead(config.hidden_size)
        self.mode_selection = PolicyHead(config.hidden_size, outputs=3)

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        video_mask: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid_thw: Sequence[Sequence[int]] | Tensor,
    ) -> PolicyScores:
        """Score every video token, every frame and the three sampling modes.

        Differentiable when gradients are enabled; otherwise the heads run folded.

        Args:
            inputs_embeds: `[B, L, D]` text and video embeddings, as they enter the language model.
            video_mask: `[B, L]` bool, true where a video token stands (separators and newlines are text).
            position_ids: `[B, L]` or `[1, L]` int64; counted along `attention_mask` when absent.
            attention_mask: `[B, L]`, nonzero for a real token and zero for padding; all real when absent.
            grid_thw: (t, h, w) of every video, in the order of the tokens; a row may hold several.

        Returns:
            `PolicyScores` with tokens `[N]`, frames `[F]` and modes `[B, 3]`, all float32.

        Raises:
            ValueError: a shape does not fit, or (CPU tensors only: elsewhere the test would synchronise)
                `video_mask` does not hold the videos of `grid_thw`.
        """
        hidden, video, grid = self._video_rows(inputs_embeds, video_mask, position_ids, attention_mask, grid_thw)
        tokens, frames = self._token_scores(video, grid)
        text = ~video_mask if attention_mask is None else attention_mask.bool() & ~video_mask
        total = text.to(hidden.dtype)[:, None] @ hidden  # [B, 1, D]
        mean = total.squeeze(1) / text.sum(1, keepdim=True).clamp(min=1)
        return PolicyScores(tokens, frames, self.mode_selection(mean.to(hidden.dtype)).float() * 100)

    @torch.no_grad()
    def select(
        self,
        inputs_embeds: Tensor,
        *,
        video_mask: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grid_thw: Sequence[Sequence[int]] | Tensor,
        budget: str = "frames",
        **selection: Any,
    ) -> Selection:
        """Choose the video tokens to keep.

        Args:
            inputs_embeds, video_mask, position_ids, attention_mask, grid_thw: as in the call of the policy.
            budget: "frames", the published one, by frame scores, for policies that were trained by draws from every
                frame; or "video": the best tokens of the whole video, for those trained by draws from it.
            selection: `keep_ratio` or `num_tokens`, and what else `select_tokens` takes ("frames") or `topk_tokens`
                ("video").

        Returns:
            `Selection` over the packed video tokens; `.within(video_mask)` extends it to the prompt.

        Raises:
            ValueError: as the call of the policy, `select_tokens` and `topk_tokens`.

        Example:
            >>> import torch, cacovid_kernels as ck
            >>> policy = ck.CompressionPolicy(ck.PolicyConfig(32, 64, 4, 2))
            >>> video_mask, prompt = torch.arange(20)[None] < 18, torch.randn(1, 20, 32)
            >>> policy.select(prompt, video_mask=video_mask, grid_thw=[(2, 3, 3)], keep_ratio=0.5).lengths
            (9,)
        """
        check_choice("CompressionPolicy.select", "budget", budget, ("frames", "video"))
        _, video, grid = self._video_rows(inputs_embeds, video_mask, position_ids, attention_mask, grid_thw)
        tokens, frames = self._token_scores(video, grid)
        if budget == "video":
            return topk_tokens(tokens, grid, **selection)
        return select_tokens(tokens, frames, grid, **selection)

    def encode(
        self, inputs_embeds: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states `[B, L, D]` after every real token has attended to every other."""
        mask = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            real = torch.ones_like(inputs_embeds[:1, :, 0], dtype=torch.bool) if mask is None else mask
            position_ids = (real.cumsum(1) - 1).clamp(min=0)
        config = self.config
        rotary = rotary_tables(position_ids, config.head_dim, config.rope_theta, inputs_embeds.dtype)
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, rotary, None if mask is None else mask[:, None, None])
        return inputs_embeds

    def _video_rows(
        self,
        inputs_embeds: Tensor,
        video_mask: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        grid_thw: Sequence[Sequence[int]] | Tensor,
    ) -> tuple[Tensor, Tensor, Grid]:
        """All hidden states `[B, L, D]`, those of the video tokens `[N, D]`, and the grid."""
        check_prompt(self.layernorm.weight, inputs_embeds, video_mask, position_ids, attention_mask)
        grid = parse_grid("CompressionPolicy", grid_thw, video_mask.flatten())
        check_whole_videos(video_mask, grid)
        hidden = self.encode(inputs_embeds, position_ids, attention_mask)
        index = masked_positions(video_mask.flatten(), sum(t * h * w for t, h, w in grid))
        # A mask that is too short for the grid (undetected off the CPU) must not address beyond the prompt.
        return hidden, hidden.flatten(0, 1)[index.clamp(max=video_mask.numel() - 1)], grid

    def _token_scores(self, video: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        norm = self.layernorm
        tokens, frames = score_tokens(
            video, self.token_compress, self.frame_compress, grid, norm_weight=norm.weight, eps=norm.eps
        )
        assert frames is not None
        return tokens, frames

    # ---- checkpoints ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        config: PolicyConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CompressionPolicy:
        """Read a policy under its official key names, from safetensors files only.

        Args:
            folder: holds `config.json` and either one `*.safetensors` or the shards of a full model with
                their `model.safetensors.index.json`; only tensors named `compression_policy.*` are read.
                A path to one `.safetensors` file works too.
            config: shape of the network; read from `config.json` (or its `text_config`) when absent.
            dtype: type of the parameters; that of the checkpoint when absent.
            device: where the parameters are put.

        Returns:
            The policy in evaluation mode.

        Raises:
            FileNotFoundError: no safetensors file, or no `config.json`.
            ImportError: the safetensors package is missing.
            ValueError: only pickled weights are there, or a tensor is missing, unknown or of another shape.
        """
        path = Path(folder)
        if not path.exists():
            raise FileNotFoundError(f"from_pretrained: {path} does not exist. Give the folder of a checkpoint.")
        if config is None:
            file = (path if path.is_dir() else path.parent) / "config.json"
            config = PolicyConfig.from_dict(json.loads(file.read_text()))
        tensors = read_policy_tensors(path, str(device))
        with torch.device("meta"):
            policy = cls(config)
        _check_tensors("from_pretrained", policy, tensors)
        policy.load_state_dict(tensors, assign=True)
        return policy.to(dtype=dtype).eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `model.safetensors` under the official key names, and `config.json`.

        Args:
            folder: created when absent.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_policy_tensors(path, self.state_dict())
        (path / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_language_model(
        cls, model: nn.Module | Mapping[str, Tensor], config: PolicyConfig | Mapping[str, Any] | None = None
    ) -> CompressionPolicy:
        """A new policy whose decoder layer is a copy of a language model's first layer; the heads are random.

        Args:
            model: a Hugging Face language model or Video-LLM of the Qwen2 or Qwen3 kind, or its state dict.
            config: shape of the network, or the model's config as a mapping; `model.config` when absent.

        Returns:
            The policy in training mode, in the dtype and on the device of the copied layer.

        Raises:
            ValueError: no first layer, more than one, or one of another kind.

        Source: CaCoVID section 3; the published trainer copies layer 0 of the language model.
        """
        if isinstance(model, nn.Module):
            config = cast(Any, model).config.to_dict() if config is None else config
            model = model.state_dict()
        if config is None:
            raise ValueError("from_language_model: config is needed with a state dict. Pass model.config.to_dict().")
        gates = [key for key in model if f".{key}".endswith("." + _GATE) and PREFIX not in key]
        if len(gates) != 1:
            raise ValueError(f"from_language_model: model must hold one '...{_GATE}', found {gates}.")
        prefix = gates[0].removesuffix("mlp.gate_proj.weight")
        layer = {key[len(prefix) :]: value for key, value in model.items() if key.startswith(prefix)}
        if not isinstance(config, PolicyConfig):
            # Which of the two kinds it is shows in the tensors; configs of the Qwen2 kind do not say.
            bias, qk_norm = "self_attn.q_proj.bias" in layer, "self_attn.q_norm.weight" in layer
            text = config.get("text_config") or config
            config = PolicyConfig.from_dict({**text, "attention_bias": bias, "qk_norm": qk_norm})
        gate = layer["mlp.gate_proj.weight"]
        policy = cls(config).to(gate.device, gate.dtype)
        _check_tensors("from_language_model", policy.layers[0], layer)
        policy.layers[0].load_state_dict(layer)
        return policy


def _check_tensors(op: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {list(tensor.shape)}, must be {list(expected[name])}"
        for name, tensor in sorted(tensors.items())
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if problems:
        raise ValueError(f"{op}: tensors must fit the config: {'; '.join(problems)}.")
