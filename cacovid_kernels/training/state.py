"""The policy and its optimiser: how they begin, are saved, come back, and are handed on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cacovid_kernels._decoder import PolicyConfig
from cacovid_kernels._safetensors import WEIGHTS, read_policy_tensors, write_policy_tensors
from cacovid_kernels.errors import UserError, first_line
from cacovid_kernels.policy import CompressionPolicy
from cacovid_kernels.training.checkpoint import (
    checkpoint_folder,
    newest_intact,
    prune,
    read_tensors,
    remove_unfinished,
    write_folder,
    write_tensors,
)
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.samplers import trained_heads
from cacovid_kernels.video_models import VideoModel

OPTIMIZER, TRAINER, CONFIG = "optimizer.safetensors", "trainer.json", "config.json"

# What may change when a run goes on: where things lie, and how the samples of a step are spread over processes.
_FREE = ("output", "data", "video_root", "save_every", "keep_checkpoints", "max_bad_rows")
_SPREAD = ("batch_size", "gradient_accumulation")

# Whole tensors, whether parameters are replicated or sharded over processes: in all, or in the main one's memory.
_WHOLE = StateDictOptions(full_state_dict=True)
_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what keeps its state to itself.

    Raises:
        UserError: DeepSpeed is configured.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "training: DeepSpeed keeps its optimizer in pickled files of its own, which these checkpoints do not "
            "hold. Use an FSDP configuration of Accelerate, or none: the policy is one layer."
        )


def first_policy(config: TrainConfig, model: VideoModel) -> CompressionPolicy:
    """The policy that training starts from.

    Raises:
        UserError: `config.policy` cannot be loaded, or is of another model; without one, the language model's first
            layer is of another kind than a policy's.
    """
    network = model.network
    if config.policy is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed % 2**63)
            try:
                return CompressionPolicy.from_language_model(network.get_decoder()).to(network.device)
            except ValueError as error:
                raise UserError(f"policy: none can be copied from the model: {error} Give a policy's folder.") from None
    try:
        policy = CompressionPolicy.from_pretrained(config.policy, device=network.device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"policy: {config.policy} cannot be loaded: {first_line(error)}") from None
    width = network.config.get_text_config().hidden_size
    if policy.config.hidden_size != width:
        found = policy.config.hidden_size
        raise UserError(f"policy: {config.policy} has hidden_size={found}, the model {width}. Give one of this model.")
    return policy


def optimizer_groups(policy: CompressionPolicy, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay; heads that no loss reaches are frozen.

    Source: CaCoVID, published `create_optimizer`.
    """
    heads = trained_heads(config)
    policy.mode_selection.requires_grad_(False)  # the published loss does not reach it either
    policy.token_compress.requires_grad_("tokens" in heads)
    policy.frame_compress.requires_grad_("frames" in heads)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            scale = config.decoder_lr_scale if name.startswith("layers.") else 1.0
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": found, "scale": scale, "weight_decay": decay} for (scale, decay), found in groups.items()]


class State:
    """Saves and restores a run. All processes call its methods together; the main one touches the disk."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        shape: PolicyConfig,
        global_batch: int,
    ) -> None:
        self.accelerator, self.policy, self.config, self.shape = accelerator, policy, config, shape
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.root = Path(config.output) / "checkpoints"
        self.global_batch = global_batch

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, then delete old ones."""
        policy: Any = get_model_state_dict(self.policy, options=_ON_MAIN)
        optimizer: Any = get_optimizer_state_dict(self.policy, self.optimizer, options=_ON_MAIN)
        if self.accelerator.is_main_process:
            known = {"step": step, "global_batch": self.global_batch, "config": self.config.to_dict()}

            def write(folder: Path) -> None:
                write_policy(folder, policy, self.shape)
                moments = {f"{kind}/{name}": x for name, y in optimizer["state"].items() for kind, x in y.items()}
                write_tensors(folder / OPTIMIZER, moments)
                (folder / TRAINER).write_text(json.dumps(known, indent=2) + "\n")

            write_folder(checkpoint_folder(self.root, step), write, {"step": step})
            prune(self.root, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Restore the newest intact checkpoint and return its step; 0 when there is none.

        Raises:
            UserError: the checkpoint was made with other settings.
        """
        found: list[Any] = [None]
        if self.accelerator.is_main_process and self.root.exists():
            remove_unfinished(self.root)
            folder, skipped = newest_intact(self.root)
            for line in skipped:
                print(f"skipped: {line}", file=sys.stderr)
            found = [folder]
        (folder,) = broadcast_object_list(found)
        if folder is None:
            return 0
        known = json.loads((folder / TRAINER).read_text())
        self._check_settings(known, folder)
        policy: Any = read_policy_tensors(folder / WEIGHTS, "cpu")
        set_model_state_dict(self.policy, policy, options=_WHOLE)
        optimizer: Any = get_optimizer_state_dict(self.policy, self.optimizer, options=_WHOLE)
        optimizer["state"] = {}
        for key, tensor in read_tensors(folder / OPTIMIZER).items():
            kind, name = key.split("/", 1)
            optimizer["state"].setdefault(name, {})[kind] = tensor
        set_optimizer_state_dict(self.policy, self.optimizer, optimizer, options=_WHOLE)
        return known["step"]

    def export(self, folder: Path) -> CompressionPolicy:
        """Write the policy alone and return a copy of it on the CPU, in evaluation mode."""
        tensors: Any = get_model_state_dict(self.policy, options=_WHOLE)
        copy = CompressionPolicy(self.shape)
        copy.load_state_dict({name: tensor.cpu() for name, tensor in tensors.items()})
        if self.accelerator.is_main_process:
            write_folder(folder, lambda staged: write_policy(staged, copy.state_dict(), self.shape), {})
        self.accelerator.wait_for_everyone()
        return copy.eval()

    def _check_settings(self, known: dict[str, Any], folder: Path) -> None:
        now, before = self.config.to_dict(), known["config"]
        changed = [name for name in now if name not in (*_FREE, *_SPREAD) and now[name] != before.get(name)]
        problems = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed]
        if known["global_batch"] != self.global_batch:
            problems.append(f"samples per step were {known['global_batch']} and are {self.global_batch}")
        if problems:
            raise UserError(
                f"resume: {folder} was made otherwise: {'; '.join(problems)}. Give another output, or undo it."
            )


def write_policy(folder: Path, tensors: dict[str, Tensor], shape: PolicyConfig) -> None:
    """`model.safetensors` and `config.json` as `CompressionPolicy.from_pretrained` reads them."""
    write_policy_tensors(folder, tensors)
    (folder / CONFIG).write_text(json.dumps(shape.to_dict(), indent=2) + "\n")
