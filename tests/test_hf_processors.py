"""Real processors of every family: what they return is compacted, and training asks its questions by them."""

from __future__ import annotations

import hf_models as hf
import hf_torchvision  # noqa: F401
import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="processors of videos need torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("av")
pytest.importorskip("rich")

from clips import encode as encode_clip
from hf_processors import processor

from cacovid_kernels.demo import pipeline
from cacovid_kernels.demo.report import Progress
from cacovid_kernels.errors import UserError
from cacovid_kernels.integrations.transformers import compress, prune_inputs
from cacovid_kernels.training import Sample, TrainConfig
from cacovid_kernels.training.rollout import encode
from cacovid_kernels.video_models import LlavaOneVision, ProcessedModel, load_model

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
TIMES = (0.0, 1.5, 3.0, 4.5)
QUESTION = "who is it?"


def model_of(family):
    return ProcessedModel(hf.tiny(family), processor(family))


def without_notes(inputs):
    """What the untouched model takes."""
    return {name: value for name, value in inputs.items() if name != "visuals"}


def loudest(embeddings, grid_thw):
    return embeddings.norm(dim=-1)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_what_a_processor_returns_is_compacted(family):
    model = model_of(family)
    inputs = model.inputs(FRAMES, QUESTION, TIMES)
    text = model.tokenizer.decode(inputs["input_ids"][0])
    assert QUESTION in text
    assert text.endswith(("assistant:", "Assistant:"))
    plain = model.network.generate(**without_notes(inputs), max_new_tokens=5, do_sample=False)
    with compress(model.network, loudest, keep_ratio=1.0):
        assert torch.equal(model.network.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
    with compress(model.network, loudest, keep_ratio=0.25) as compression:
        model.network.generate(**inputs, max_new_tokens=5)
    placeholders = int(torch.isin(inputs["input_ids"], torch.tensor([hf.IMAGE, hf.VIDEO])).sum())
    assert 2 <= compression.kept[0] <= 0.25 * placeholders
    out = prune_inputs(model.network, inputs, loudest, keep_ratio=0.25)
    assert out["attention_mask"].shape == compression.inputs["attention_mask"].shape


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_training_asks_by_the_processor(family):
    model = model_of(family)
    prompt = encode(model, Sample("clip", FRAMES, QUESTION, "me", TIMES), TrainConfig(output="", keep_ratio=0.5))
    t, h, w = prompt.grid
    assert len(prompt.video) == t * h * w
    assert prompt.length == model.inputs(FRAMES, QUESTION, TIMES)["input_ids"].shape[1]
    assert model.tokenizer.decode(prompt.answer) == "me" + TrainConfig(output="", keep_ratio=0.5).answer_end


def test_models_are_told_the_times_of_frames():
    ids = {
        times: processed.tokenizer.decode(processed.inputs(FRAMES, QUESTION, times)["input_ids"][0])
        for processed in [model_of("video_llama_3")]
        for times in (TIMES, None)
    }
    assert "4.5s" in ids[TIMES]
    assert "3.0s" in ids[None]
    assert "4.5s" not in ids[None]
    assert "<3.8 seconds>" in model_of("qwen3_vl").tokenizer.decode(
        model_of("qwen3_vl").inputs(FRAMES, QUESTION, TIMES)["input_ids"][0]
    )  # the mean of two frames


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_folders_are_loaded(family, tmp_path):
    hf.tiny(family).save_pretrained(tmp_path)
    processor(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert isinstance(model, LlavaOneVision if family == "llava_onevision" else ProcessedModel)
    inputs = model.inputs(FRAMES, QUESTION)
    assert model.network(**without_notes(inputs)).logits.isfinite().all()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"model: .*") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_the_demo_runs_a_folder(family, tmp_path):
    hf.tiny(family).save_pretrained(tmp_path / "model")
    processor(family).save_pretrained(tmp_path / "model")
    options = pipeline.Options(
        video=encode_clip(tmp_path / "clip.mp4", frames=12, size=(16, 16)),
        question=QUESTION,
        model=str(tmp_path / "model"),
        num_frames=4,
        keep_ratio=0.5,
        max_new_tokens=3,
        repeats=1,
    )
    assert pipeline.run(options, tmp_path, Progress()).agreement.holds


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "llava_onevision"])
def test_a_video_of_one_frame(family):
    model = model_of(family)
    prompt = encode(
        model, Sample("clip", FRAMES[:1], QUESTION, "me", TIMES[:1]), TrainConfig(output="", keep_ratio=0.5)
    )
    assert prompt.grid == (1, 2, 2)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_question_with_a_placeholder(family):
    model = model_of(family)
    with pytest.raises(UserError, match="question: it must not contain "):
        model.inputs(FRAMES, f"what is {model.processor.video_token}?")


def test_the_demo_refuses_a_placeholder_in_one_line(tmp_path):
    hf.tiny("qwen2_5_vl").save_pretrained(tmp_path / "model")
    processor("qwen2_5_vl").save_pretrained(tmp_path / "model")
    video = encode_clip(tmp_path / "clip.mp4", frames=4, size=(16, 16))
    options = pipeline.Options(video=video, question="what is <|video_pad|>?", model=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"question: it must not contain <\|video_pad\|>") as caught:
        pipeline.run(options, tmp_path, Progress())
    assert "\n" not in str(caught.value)
