"""Checkpoints that are whole or not there: safetensors and JSON, hashed, renamed into place, verified on loading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cacovid_kernels

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be loaded; the message says why."""


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Folders with the name of a checkpoint, newest first; none of them verified."""
    return sorted((x for x in root.glob("step-????????") if x.name[5:].isdigit() and x.is_dir()), reverse=True)


def write_folder(folder: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Make a folder appear with all of its files or not at all, whenever the process or the machine stops.

    Args:
        folder: where it shall be; what is there is replaced.
        write: is given an empty folder and puts files into it.
        facts: further entries of the manifest.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    write(staged)
    files = {}
    for file in sorted(staged.iterdir()):
        _sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    versions = {"cacovid_kernels": cacovid_kernels.__version__, "torch": torch.__version__}
    manifest = {**facts, "versions": versions, "files": files}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(staged / MANIFEST)
    _sync(staged)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-old")
        os.replace(folder, old)
        shutil.rmtree(old)
    os.replace(staged, folder)
    _sync(folder.parent)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, bit for bit.

    Raises:
        DamagedCheckpointError: a file is missing, changed or not in the manifest, or the manifest itself is bad.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {str(name): (int(x["bytes"]), str(x["sha256"])) for name, x in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    found = {file.name for file in folder.iterdir()} - {MANIFEST}
    if found != files.keys():
        odd = ", ".join(sorted(found ^ files.keys()))
        raise DamagedCheckpointError(f"{folder}: files differ from the manifest's: {odd}")
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedCheckpointError(f"{folder}: {name} must have {size} bytes")
        if _digest(file) != digest:
            raise DamagedCheckpointError(f"{folder}: {name} has changed since it was written (sha256)")
    return manifest


def newest_intact(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not."""
    skipped = []
    for folder in checkpoints(root):
        try:
            verify(folder)
        except DamagedCheckpointError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def prune(root: Path, keep: int) -> None:
    """Delete what is older than the newest `keep` checkpoints that verify."""
    intact = 0
    for folder in checkpoints(root):
        if intact >= keep:
            shutil.rmtree(folder)
            continue
        try:
            verify(folder)
            intact += 1
        except DamagedCheckpointError:
            pass  # it stays, for whoever wants to know why; it does not count


def remove_unfinished(root: Path) -> None:
    """Delete what a stopped process had not finished writing."""
    for folder in root.glob("*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
