"""The procedural world as a data set of the trainer."""

from __future__ import annotations

import numpy as np
import pytest
from training_toy import toy_config
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cacovid_kernels.demo.world.network import WorldGeometry, build_network
from cacovid_kernels.demo.world.questions import KINDS, word_tokenizer
from cacovid_kernels.demo.world.rows import WorldRows
from cacovid_kernels.training import Trainer, read_log
from cacovid_kernels.training.rollout import encode
from cacovid_kernels.video_models import LlavaOneVision


@pytest.fixture(scope="module")
def model():
    tokenizer = word_tokenizer()
    network = build_network(WorldGeometry(layers=1), tokenizer, seed=0).eval()
    return LlavaOneVision(network, tokenizer, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


def test_rows_are_a_function_of_their_number():
    rows = WorldRows(100)
    for i in (0, 5, 99):
        a, b = rows[i], WorldRows(1000)[i]
        assert (a.name, a.question, a.answer) == (b.name, b.question, b.answer)
        assert np.array_equal(a.frames, b.frames)
    assert {rows[i].name.split()[0] for i in range(len(KINDS))} == set(KINDS)
    assert rows[0].question != rows[len(KINDS)].question or rows[0].answer != rows[len(KINDS)].answer
    with pytest.raises(IndexError, match=r"row 100 must be in \[0, 100\)"):
        rows[100]


def test_questions_and_answers_are_words_of_the_model(model):
    config = toy_config("")
    unknown = model.tokenizer.unk_token_id
    for i in range(len(KINDS)):
        prompt = encode(model, WorldRows()[i], config)
        assert prompt.grid == (8, 6, 6)
        assert len(prompt.answer) == 2  # the word and the end of the chat
        assert unknown not in prompt.answer.tolist()
        assert unknown not in model.prompt(prompt.sample.question, 8 * 36).tolist()[0]


def test_a_step_in_the_world(model, tmp_path):
    config = toy_config(tmp_path, keep_ratio=0.1, min_keep_ratio=0.05, max_keep_ratio=0.12, max_steps=1, save_every=1)
    Trainer(config, model, WorldRows()).train()
    assert read_log(tmp_path)[0]["kept_ratio"] == pytest.approx(4 * 8 / 288, abs=0.03)
