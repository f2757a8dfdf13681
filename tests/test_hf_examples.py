"""Every script of examples/transformers runs on a tiny model; the processor of its checkpoint is played."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import hf_models as hf
import pytest
import torch
import transformers

from cacovid_kernels.integrations.transformers.registry import _adapters, adapter_of

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "transformers").glob("*.py"))


class Processor:
    """Gives the tiny model's prompt whatever it is asked to read, and keeps what it was asked to write."""

    def __init__(self, family):
        self.batch, self.calls, self.answers = hf.batch(family), [], None

    def __call__(self, **options):
        self.calls.append(options)
        return transformers.BatchFeature(dict(self.batch.inputs))

    def apply_chat_template(self, messages, **options):
        return self(messages=messages, **options)

    def batch_decode(self, ids, **options):
        self.answers = ids
        return ["the answer"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script(script, tmp_path, monkeypatch, capsys):
    family = script.stem
    hf.tiny(family).save_pretrained(tmp_path)
    processor = Processor(family)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.setattr(sys, "argv", [str(script), "clip.mp4", str(tmp_path)])
    found = runpy.run_path(str(script), run_name="__main__")
    assert "the answer" in capsys.readouterr().out
    assert "clip.mp4" in str(processor.calls)
    assert processor.answers.shape == (1, 64)
    assert torch.equal(found["ids"][:, :-64], processor.batch.inputs["input_ids"])
    assert adapter_of(found["model"]).model_types[0] == family
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 16


def test_every_family_has_a_script():
    assert {script.stem for script in SCRIPTS} == {adapter.model_types[0] for adapter in _adapters.values()}


def test_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    inputs = hf.batch("llava_onevision").inputs
    names = {"model": hf.tiny("llava_onevision"), "inputs": inputs, "question_ids": torch.tensor([[5, 6, 7]])}
    try:
        for block in blocks:
            exec(compile(block, "integrations.md", "exec"), names)
    finally:
        _adapters.pop("my_model", None)
    assert names["compression"].kept == (4,)
    assert names["second"].shape[1] > 16
    assert len(blocks) == 6


def test_the_table_names_every_family():
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    for adapter in _adapters.values():
        assert f"| {adapter.family} | `{adapter.model_types[0]}` |" in text
