"""The walk-throughs run and show what they say, and the committed notebooks are these scripts."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("av")

import matplotlib.pyplot as plt
import transformers

from cacovid_kernels.demo.render import write_lossless
from cacovid_kernels.demo.world.questions import ANSWERS, ask
from cacovid_kernels.demo.world.scenes import GLOWING, draw
from cacovid_kernels.video import read_clip

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "walkthroughs").glob("*.py"))
NOTEBOOKS = ROOT / "docs" / "walkthroughs"


def run(name, *arguments):
    """The names a script leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        plt.switch_backend("Agg")
        patch.setattr(plt, "show", lambda: plt.close("all"))
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return runpy.run_path(str(ROOT / "examples" / "walkthroughs" / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def llava():
    return run("llava_onevision")


@pytest.fixture(scope="module")
def qwen():
    return run("qwen3_vl")


def test_the_questions_have_these_answers(llava):
    questions = ask(draw(5, [4]))
    truth = {words: ANSWERS[answer] for words, answer in zip(questions.words[0], questions.answers[0], strict=True)}
    assert llava["answers"] == truth
    assert truth[llava["question"]] == "green"
    assert sum(weight.numel() for weight in llava["model"].parameters()) == 453_760


def test_llava_answers_in_full_and_compressed(llava):
    table = llava["table"]
    assert {counts[0] for counts in table.values()} == {6}
    assert table["trained policy"] == [6, 6, 6, 6]
    assert all(counts[-1] < 6 for name, counts in table.items() if name != "trained policy")
    assert int(llava["kept_tokens"](llava["out"]).sum()) == 28
    assert "generate" not in vars(llava["model"])  # nothing is left of `compress`


def test_llava_heat_is_highest_on_what_glows(llava):
    scenes = draw(5, [4])
    top = scenes.top()[0]  # [T, CELLS], the object seen, -1 where there is none
    glows = np.array([[m >= 0 and scenes.glows[0, m, t] for m in cells] for t, cells in enumerate(top)])
    best = llava["scores"].topk(3).indices
    assert glows.reshape(-1)[best].all()
    pole = (top == GLOWING) & glows
    assert pole[3].any()
    assert pole.reshape(-1)[best].any()


def test_llava_is_the_masked_run(llava):
    assert (llava["short"] - llava["masked"]).abs().max() <= 1e-5
    assert llava["error"] > 1


def test_llava_another_question_wants_a_selector_that_read_none(llava):
    policy, divprune = llava["following"]["trained policy"], llava["following"]["divprune"]
    assert divprune[0] == 30
    assert policy[0] < divprune[0]
    assert policy[1] < divprune[1] < 30


def test_llava_gradient_is_where_tokens_were_kept(llava):
    assert llava["same"]
    assert int(llava["reached"].sum()) == 28
    assert llava["loss"] > 0.1


def test_qwen_is_the_masked_run(qwen):
    assert qwen["difference"] <= 1e-5
    assert qwen["later_difference"] <= 1e-5
    assert (qwen["without"] - qwen["short"]).abs().max() > 0.1  # embeddings alone
    everything = qwen["masked_logits"](qwen["inputs"], torch.ones_like(qwen["kept"]))
    assert (everything[-1] - qwen["short"][-1]).abs().max() > 0.01


def test_qwen_keeps_structure(qwen):
    assert int(qwen["cells"].sum()) == 14
    assert (qwen["cells"].sum((1, 2)) == 0).any()  # the text shows a frame that keeps nothing
    after = qwen["outline"](qwen["out"]["input_ids"])
    assert after.count("seconds>") == after.count("<|vision_start|>") == after.count("<|vision_end|>") == 8


def test_qwen_on_a_checkpoint_and_a_video(qwen, tmp_path, monkeypatch):
    qwen["model"].save_pretrained(tmp_path)
    write_lossless(np.repeat(qwen["frames"], 2, axis=0), tmp_path / "clip.mkv")

    class Processor:
        tokenizer, calls = qwen["tokenizer"], []

        def apply_chat_template(self, messages, **options):
            self.calls.append(messages)
            return transformers.BatchFeature(dict(qwen["inputs"]))

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    found = run("qwen3_vl", tmp_path, tmp_path / "clip.mkv")
    assert "clip.mkv" in str(Processor.calls)
    assert found["difference"] <= 1e-5
    assert torch.equal(found["cells"], qwen["cells"])
    assert np.array_equal(found["frames"], read_clip(tmp_path / "clip.mkv", 8).frames)


def cells_of(script):
    """(kind, source) of every cell of a script in percent format."""
    _, *parts = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.M)
    cells = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if head.strip() == "[markdown]" else "code"
        source = re.sub(r"^# ?", "", body.strip(), flags=re.M) if kind == "markdown" else body.strip()
        cells.append((kind, source))
    return cells


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_the_script_and_ran(script):
    path = NOTEBOOKS / f"{script.stem}.ipynb"
    notebook = json.loads(path.read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == cells_of(script), f"{path.name} is not {script.name}: run `make walkthroughs`."
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_names_no_machine(script):
    notebook = json.loads((NOTEBOOKS / f"{script.stem}.ipynb").read_text())
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        output.get("data", {}).pop("image/png", None)
    assert not re.search(r"(?<![\w:/.>])/\w+/\w|site-packages|\d ms\b", json.dumps(notebook))
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


def test_every_notebook_has_its_script():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {script.stem for script in SCRIPTS}
    readme, guide = (ROOT / "README.md").read_text(), (ROOT / "docs" / "integrations.md").read_text()
    assert all(f"walkthroughs/{script.stem}.ipynb" in text for script in SCRIPTS for text in (readme, guide))
