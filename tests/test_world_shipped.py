"""The model and the policy that come along: how well they answer, and the demo that shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")

import cacovid_kernels as ck
from cacovid_kernels.demo import pipeline
from cacovid_kernels.demo.render import write_lossless
from cacovid_kernels.demo.report import Progress, notes
from cacovid_kernels.demo.world import MODEL, POLICY, train_model
from cacovid_kernels.demo.world.evaluate import ALL, evaluate
from cacovid_kernels.demo.world.questions import KINDS, ask
from cacovid_kernels.demo.world.rules import RULES, policy_rule
from cacovid_kernels.demo.world.scenes import draw
from cacovid_kernels.errors import UserError
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.video import read_clip
from cacovid_kernels.video_models import load_model


@pytest.fixture(scope="module")
def shares():
    """Right answers by rule at a tenth of the tokens, on 240 questions."""
    model = load_model(str(MODEL))
    names = ("random", "diversity (DivPrune)", "centre distance (VidCom2)")
    rules = {name: RULES[name] for name in names}
    rules["policy"] = policy_rule(ck.CompressionPolicy.from_pretrained(POLICY, dtype=torch.float32))
    scores = evaluate(model.network.float(), model.tokenizer, rules=rules, ratios=(0.1,), count=240, seed=8)
    return {score.rule: score.share for score in scores}


def test_the_world_is_hard_and_the_policy_knows_it(shares):
    assert shares[ALL] >= 0.95
    assert shares["random"] <= 0.6
    best_rule = max(share for rule, share in shares.items() if rule not in (ALL, "policy"))
    assert best_rule <= 0.85
    assert shares["policy"] >= 0.9
    assert shares["policy"] >= best_rule + 0.1


def test_what_comes_along_says_how_it_was_made():
    record = json.loads((MODEL / "training.json").read_text())
    assert train_model.TrainConfig(**record["config"]) == train_model.TrainConfig()
    assert record["log"][-1]["step"] == record["config"]["steps"]
    config = TrainConfig.from_file(POLICY / "training.json")
    assert (config.data, config.model) == ("world", "world")
    files = [*MODEL.iterdir(), *POLICY.iterdir()]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_lossless_clips_come_back_as_they_are(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 48, 40, 3), dtype=np.uint8)
    write_lossless(frames, tmp_path / "clip.mkv")
    clip = read_clip(tmp_path / "clip.mkv", 32)
    assert np.array_equal(clip.frames, frames)
    assert clip.timestamps == (0.0, 0.5, 1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    options = [pipeline.Options(seed=seed, repeats=1, max_new_tokens=4) for seed in range(len(KINDS))]
    return [pipeline.run(one, folder, Progress()) for one in options]


def test_the_demo_answers_right_before_and_after(runs):
    for run in runs:
        assert run.agreement.holds
        assert run.answers == {"full": run.scene.truth, "compressed": run.scene.truth}, run.scene.question
        assert f"the right answer: {run.scene.truth}" in notes(run)
        assert run.selection.lengths == (28,)


def test_the_heat_falls_on_the_object_asked_for(runs):
    for kind, run in enumerate(runs):
        truth = ask(draw(pipeline.DEMO_SEED, [run.options.seed])).truth[0, kind].reshape(-1)
        best = run.token_scores.topk(len(KINDS)).indices
        assert truth[best].any(), run.scene.question
        assert run.token_scores[truth].mean() > run.token_scores[~truth].mean() + 3


def test_another_question_about_the_clip(runs, tmp_path):
    options = pipeline.Options(question=runs[1].scene.question, seed=0, repeats=1, max_new_tokens=2)
    assert pipeline.run(options, tmp_path, Progress()).scene.truth is None  # not the clip's own question
    with pytest.raises(UserError, match=r"no word zebra\. It knows: .*star") as refused:
        pipeline.run(pipeline.Options(question="what colour is the zebra"), tmp_path, Progress())
    assert "\n" not in str(refused.value)


def test_the_published_budget_spreads_over_frames(tmp_path):
    options = pipeline.Options(budget="frames", repeats=1, max_new_tokens=2)
    run = pipeline.run(options, tmp_path, Progress())
    assert run.agreement.holds
    assert (run.selection.frame_counts > 0).all()
