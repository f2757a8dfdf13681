"""Everything that decides how a policy is trained, in one place."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacovid_kernels.errors import UserError

SAMPLERS = ("combinations", "gumbel", "gumbel_video")
REWARDS = ("exact", "log_prob", "generated")


@dataclass(frozen=True)
class TrainConfig:
    """How a compression policy is trained; the defaults are the published run's unless a comment says otherwise.

    Raises:
        UserError: a value breaks its rule; one line says which.

    Example:
        >>> from cacovid_kernels.training import TrainConfig
        >>> TrainConfig(sampler="combinations", keep_ratio=0.05).num_combinations
        32

    Source: CaCoVID (arXiv 2602.01649), the published `run_llava_onevision.sh` and `grpo_trainer.py`.
    """

    # What is trained on what.
    data: str = ""  # JSON list or JSON lines: video, question, answer per row; "world": the procedural world
    output: str = "runs/policy"
    model: str = "llava-hf/llava-onevision-qwen2-7b-ov-hf"  # or a folder; "world": the procedural world's
    policy: str | None = None  # start from this policy; None: the language model's first layer, random heads
    video_root: str = ""  # relative video paths start here; "": at the data file
    num_frames: int = 32
    dtype: str = "auto"  # of the frozen model; the policy's parameters are float32

    # Combinations of tokens.
    mode: str = "strict"  # "official": the published arithmetic, quirks included
    sampler: str = "gumbel"  # learned fastest at 5.6 % (docs/results); the paper's: "combinations"; or "gumbel_video"
    num_content: int = 1  # combinations by density peaks: a baseline, in no loss
    num_token: int = 23
    num_frame: int = 8
    keep_ratio: float = 0.02
    group_size: float = 2.0
    max_group_prob: float = 2.0
    frame_ratio: float = 0.125

    # Replay: one sample is optimised several times, over all combinations drawn for it so far.
    num_iterations: int = 5
    easy_accuracy: float = 0.875  # at least this: the keep ratio is halved for the next draw
    hard_accuracy: float = 0.125  # at most this: it is doubled
    min_keep_ratio: float = 0.01
    max_keep_ratio: float = 0.12

    # Reward.
    reward: str = "exact"  # or "log_prob" of the answer; "generated": text by text, for answers of several forms
    answer_end: str = "<|im_end|>"  # appended to the answer for "exact" and "log_prob"; "" for none
    max_new_tokens: int = 768  # of a generated answer

    # Loss and optimiser.
    eps_low: float = 0.2
    eps_high: float = 0.28
    kl_weight: float = 0.0
    learning_rate: float = 1e-6
    decoder_lr_scale: float = 0.1  # the decoder layer is pretrained, the heads are not
    weight_decay: float = 0.01  # of matrices; biases and norms have none
    max_grad_norm: float = 5.0
    batch_size: int = 1  # samples per process whose combinations share one forward
    gradient_accumulation: int = 1
    epochs: int = 1
    max_steps: int = 0  # 0: as many as the epochs hold
    seed: int = 42

    # Not part of the published run: what is kept and said.
    save_every: int = 100
    keep_checkpoints: int = 2
    max_bad_rows: int = 100

    def __post_init__(self) -> None:
        for name, rule, holds in (
            ("mode", "'official' or 'strict'", self.mode in ("official", "strict")),
            ("sampler", f"one of {', '.join(SAMPLERS)}", self.sampler in SAMPLERS),
            ("reward", f"one of {', '.join(REWARDS)}", self.reward in REWARDS),
            ("dtype", "'auto', 'float32' or 'bfloat16'", self.dtype in ("auto", "float32", "bfloat16")),
            ("keep_ratio", "in (0, 1]", 0 < self.keep_ratio <= 1),
            ("frame_ratio", "in (0, 1]", 0 < self.frame_ratio <= 1),
            ("min_keep_ratio", "in (0, 1]", 0 < self.min_keep_ratio <= 1),
            ("max_keep_ratio", "in (0, 1]", 0 < self.max_keep_ratio <= 1),
            (
                "min_keep_ratio",
                f"at most max_keep_ratio={self.max_keep_ratio}",
                self.min_keep_ratio <= self.max_keep_ratio,
            ),
            ("group_size", "above 0", self.group_size > 0),
            ("hard_accuracy", "below easy_accuracy", self.hard_accuracy < self.easy_accuracy),
            ("keep_checkpoints", "at least 2, or a damaged one leaves nothing", self.keep_checkpoints >= 2),
            ("kl_weight", "0 with this sampler, whose draws have no prior", self._may_have_prior),
            ("seed", "in [0, 2^64)", 0 <= self.seed < 2**64),
        ):
            if not holds:
                raise UserError(f"config: {name}={getattr(self, name)!r} must be {rule}.")
        least = {
            "num_token": 1, "num_frames": 1, "num_iterations": 1, "batch_size": 1, "gradient_accumulation": 1,
            "epochs": 1, "save_every": 1, "max_new_tokens": 1,
            "num_content": 0, "num_frame": 0, "max_steps": 0, "max_bad_rows": 0, "eps_low": 0, "eps_high": 0,
            "kl_weight": 0, "learning_rate": 0, "decoder_lr_scale": 0, "weight_decay": 0, "max_grad_norm": 0,
            "group_size": 0, "max_group_prob": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value < math.inf:
                raise UserError(f"config: {name}={value} must be finite and at least {bound}.")

    @property
    def _may_have_prior(self) -> bool:
        return self.sampler == "combinations" or self.kl_weight == 0

    @property
    def num_combinations(self) -> int:
        """Combinations of one draw, whichever sampler makes them."""
        return self.num_content + self.num_token + self.num_frame

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Check the names and types of all values.

        Raises:
            UserError: a name is unknown, or a value has another type or breaks its rule.
        """
        kinds = typing.get_type_hints(cls)
        unknown = sorted(values.keys() - kinds.keys())
        if unknown:
            raise UserError(f"config: unknown {', '.join(unknown)}. Known: {', '.join(sorted(kinds))}.")
        return cls(**{name: _typed(name, value, kinds[name]) for name, value in values.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a JSON or TOML file.

        Raises:
            UserError: the file cannot be read, or as `from_dict`.
        """
        path = Path(path)
        try:
            if path.suffix == ".toml":
                values = _read_toml(path.read_text())
            else:
                values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"config: {path} cannot be read: {error}.") from None
        if not isinstance(values, dict):
            raise UserError(f"config: {path} must hold one table of names and values.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _read_toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        raise UserError("config: TOML needs Python 3.11. Write it as JSON.") from None
    return tomllib.loads(text)


def _typed(name: str, value: Any, kind: Any) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds:  # exactly: True is no number
        return value
    expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"config: {name}={value!r} must be {expected}.")
