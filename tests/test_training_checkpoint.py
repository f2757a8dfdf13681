"""Checkpoints: whole or not there, every damage found, two intact ones kept."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from cacovid_kernels.training.checkpoint import (
    DamagedCheckpointError,
    checkpoint_folder,
    checkpoints,
    newest_intact,
    prune,
    read_tensors,
    remove_unfinished,
    verify,
    write_folder,
    write_tensors,
)


def _write(root, step):
    def fill(folder):
        write_tensors(folder / "weights.safetensors", {"w": torch.full((40,), float(step))})
        (folder / "state.json").write_text(json.dumps({"step": step}))

    write_folder(checkpoint_folder(root, step), fill, {"step": step})


def _names(root):
    return [folder.name for folder in checkpoints(root)]


def test_what_was_written_comes_back(tmp_path):
    for step in (1, 12, 3):
        _write(tmp_path, step)
    assert _names(tmp_path) == ["step-00000012", "step-00000003", "step-00000001"]
    folder, skipped = newest_intact(tmp_path)
    assert (folder.name, skipped) == ("step-00000012", [])
    assert read_tensors(folder / "weights.safetensors")["w"].tolist() == [12.0] * 40
    manifest = verify(folder)
    assert manifest["step"] == 12
    assert manifest["versions"]["torch"] == torch.__version__
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(_names(tmp_path))


def test_nothing_there(tmp_path):
    assert newest_intact(tmp_path / "gone") == (None, [])


def _flip(file, rng):
    data = bytearray(file.read_bytes())
    bit = int(rng.integers(len(data) * 8))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def _truncate(file, rng):
    os.truncate(file, int(rng.integers(file.stat().st_size)))


def _remove(file, rng):
    file.unlink()


def _swap(file, rng):
    file.write_bytes((file.parent.parent / "step-00000001" / file.name).read_bytes())


def _extra(file, rng):
    file.with_name("more.safetensors").write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove, _swap, _extra])
def test_every_damage_is_found_and_the_one_before_is_loaded(damage, tmp_path):
    rng = np.random.default_rng(0)
    for step in (1, 2):
        _write(tmp_path, step)
    for trial in range(40):
        target = tmp_path / "step-00000003"
        shutil.rmtree(target, ignore_errors=True)
        _write(tmp_path, 3)
        names = sorted(file.name for file in target.iterdir())
        damage(target / names[trial % len(names)], rng)
        folder, skipped = newest_intact(tmp_path)
        assert folder.name == "step-00000002"
        assert len(skipped) == 1
        assert "step-00000003" in skipped[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {"a": 1}}', '{"files": 3}'])
def test_a_manifest_that_is_none(text, tmp_path):
    _write(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be read"):
        verify(tmp_path / "step-00000001")


def test_a_failure_in_between_leaves_what_was_there(tmp_path):
    _write(tmp_path, 1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(checkpoint_folder(tmp_path, 1), fail, {})
    assert verify(tmp_path / "step-00000001")["step"] == 1
    remove_unfinished(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    _write(tmp_path, 4)
    (tmp_path / "step-00000004" / "state.json").unlink()
    _write(tmp_path, 4)
    assert newest_intact(tmp_path)[0].name == "step-00000004"


def test_pruning_counts_intact_checkpoints_alone(tmp_path):
    for step in range(1, 7):
        _write(tmp_path, step)
    for step in (6, 4):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    prune(tmp_path, 2)
    assert _names(tmp_path) == [f"step-{step:08d}" for step in (6, 5, 4, 3)]
    assert newest_intact(tmp_path)[0].name == "step-00000005"
    prune(tmp_path, 3)
    assert len(_names(tmp_path)) == 4
