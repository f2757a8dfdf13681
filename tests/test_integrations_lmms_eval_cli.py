"""`python -m lmms_eval --model cacovid` with a trained tiny model, its real processor and videos with known answers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch

transformers = pytest.importorskip("transformers")
av = pytest.importorskip("av")
pytest.importorskip("accelerate")
if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)
pytest.importorskip("torchvision", reason="lmms-eval and the processor need torchvision")

from cacovid_kernels.demo.world import MODEL  # noqa: E402
from cacovid_kernels.demo.world.questions import ANSWERS, KINDS, ask  # noqa: E402
from cacovid_kernels.demo.world.rules import RULES, answers_right, samples  # noqa: E402
from cacovid_kernels.demo.world.scenery import SIZE, paint  # noqa: E402
from cacovid_kernels.demo.world.scenes import WorldConfig, draw  # noqa: E402
from cacovid_kernels.video_models import load_model  # noqa: E402

ROOT = Path(__file__).parents[1]
COUNT, SEED, WORLD = 24, 2, WorldConfig()
KEPT = int(0.1 * WORLD.tokens)

TEMPLATE = """\
{% for message in messages %}<|im_start|> {{ message['role'] }} \
{% for item in message['content'] %}\
{% if item['type'] == 'video' %}<video>{% else %} {{ item['text'] }}{% endif %}\
{% endfor %} <|im_end|> {% endfor %}\
{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"""
TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function questions.visual
doc_to_text: !function questions.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
def visual(doc):
    return [doc["video"]]


def text(doc):
    return doc["question"]
"""


def save_model(folder):
    """The world's model with the processor that a checkpoint of LLaVA-OneVision has."""
    shutil.copytree(MODEL, folder)
    size = {"height": SIZE, "width": SIZE}
    transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size),
        transformers.AutoTokenizer.from_pretrained(MODEL),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=WORLD.tokens // WORLD.frames * 4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def save_task(folder):
    """A task of lmms-eval: a question about each of COUNT videos, in turn of every kind."""
    folder.mkdir()
    scenes = draw(SEED, np.arange(COUNT), WORLD)
    questions, rows = ask(scenes), []
    for i, frames in enumerate(paint(scenes)):
        file, kind = str(folder / f"{i}.mkv"), i % len(KINDS)
        with av.open(file, "w") as container:
            stream = container.add_stream("ffv1", rate=4)  # loses nothing
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "bgr0"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        answer = ANSWERS[questions.answers[i, kind]]
        rows.append({"video": file, "question": questions.words[i][kind], "answer": answer})
    (folder / "docs.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.yaml").write_text(TASK.format(data=folder / "docs.json"))
    (folder / "questions.py").write_text(FUNCTIONS)


def save_entry_point(folder):
    """What installing this package writes down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "entry_of_cacovid-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-of-cacovid\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in project["entry-points"]["lmms_eval.models"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))


@torch.no_grad()
def right_without_the_harness():
    """`[COUNT]` bool: the model is right on the KEPT tokens that DivPrune keeps, its prompt built by hand."""
    model, right = load_model(str(MODEL)), np.zeros(COUNT, bool)
    for kind, sample in samples(model.network.float(), model.tokenizer, WORLD, SEED, COUNT):
        rows = np.arange(COUNT) % len(KINDS) == kind
        right[rows] = answers_right(sample, RULES["diversity (DivPrune)"](sample, KEPT)).numpy()
    return right


def test_the_command_line_answers_a_task_by_the_name_of_the_model(tmp_path):
    save_model(tmp_path / "model")
    save_task(tmp_path / "tasks")
    save_entry_point(tmp_path / "site")
    command = [sys.executable, "-m", "lmms_eval", "--model", "cacovid", "--tasks", "questions"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},keep_ratio=0.1,dtype=float32"]
    command += ["--include_path", tmp_path / "tasks", "--batch_size", "4", "--device", "cpu"]
    command += ["--log_samples", "--output_path", tmp_path / "out"]
    paths = [str(tmp_path / "site"), str(ROOT), *filter(None, sys.path)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]

    (results,) = (tmp_path / "out").glob("*/*_results.json")
    (log,) = (tmp_path / "out").glob("*/*_samples_questions.jsonl")
    logged = sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    right = right_without_the_harness()
    assert 0 < right.sum() < COUNT  # else nothing would depend on the tokens kept
    assert [sample["exact_match"] == 1 for sample in logged] == right.tolist()
    score = json.loads(results.read_text())["results"]["questions"]["exact_match,none"]
    assert score == pytest.approx(right.mean())
    for sample in logged:  # two words before the video, a newline behind it, the end of the turn, and two words
        counts = {"input_tokens": KEPT + len(sample["input"].split()) + 6, "output_tokens": 1}
        assert sample["token_counts"] == [counts]
