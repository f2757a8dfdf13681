"""Reading and writing the policy's tensors under their official names, from safetensors files only."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from torch import Tensor

PREFIX = "compression_policy."
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch as package
    except ImportError as error:
        raise ImportError(
            "CompressionPolicy: checkpoints need the safetensors package. pip install 'cacovid-kernels[hf]'."
        ) from error
    return package


def _policy_name(key: str) -> str | None:
    """The part of a key after `compression_policy.`, which may itself stand inside a wrapper's prefix."""
    head, found, name = key.rpartition(PREFIX)
    return name if found and (not head or head.endswith(".")) else None


def _shards(folder: Path) -> list[Path]:
    if folder.is_file() and folder.suffix == ".safetensors":
        return [folder]
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        shards = sorted({shard for key, shard in names.items() if _policy_name(key) is not None})
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise ValueError(f"from_pretrained: {INDEX} must name files of its own folder, got {outside[0]!r}.")
        return [folder / shard for shard in shards]
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return shards
    pickles = [folder] if folder.is_file() else [p for name in PICKLES for p in sorted(folder.glob(name))]
    if pickles:
        raise ValueError(
            f"from_pretrained: {pickles[0].name} must be a safetensors file: reading a pickle can run code. "
            "Convert it once, where you trust it, with safetensors.torch.save_file(state_dict, path)."
        )
    raise FileNotFoundError(f"from_pretrained: no safetensors file in {folder}.")


def read_policy_tensors(folder: Path, device: str) -> dict[str, Tensor]:
    """Tensors whose key holds `compression_policy.`, with what stands before and including it removed."""
    tensors = {}
    for shard in _shards(folder):
        with _safetensors().safe_open(shard, framework="pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                name = _policy_name(key)
                if name is not None:
                    tensors[name] = file.get_tensor(key)
    if not tensors:
        raise ValueError(f"from_pretrained: {folder} must hold tensors named '{PREFIX}*', it has none.")
    return tensors


def write_policy_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `model.safetensors` with the official key names."""
    named = {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _safetensors().save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
