"""Training on models of every Hugging Face family: answers from combinations are those of the masked model."""

from __future__ import annotations

import hf_models as hf
import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from hf_played import Played
from test_hf_oracle import case, full_run

import cacovid_kernels as ck
from cacovid_kernels.errors import UserError
from cacovid_kernels.integrations.transformers import prune_inputs
from cacovid_kernels.training import Sample, TrainConfig, Trainer
from cacovid_kernels.training.rollout import attempt, encode

FAMILIES = [*hf.FAMILIES, "qwen3_vl_moe"]


def config(output="", **changes):
    values = {"answer_end": "", "num_token": 5, "num_frame": 2, "num_content": 1, "num_iterations": 2}
    return TrainConfig(output=str(output), keep_ratio=0.5, **{**values, "batch_size": 2, "max_steps": 1, **changes})


def sample(question, answer):
    return Sample(f"prompt {question}", np.zeros((4, 2, 2, 3), np.uint8), question, answer, (0.0, 0.5, 1.0, 1.5))


def draws(prompt, k, g=3):
    return torch.stack([torch.randperm(len(prompt.video))[:k].sort().values for _ in range(g)])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_from_combinations_are_those_of_the_masked_model(family):
    """Two prompts, answers of other lengths, other numbers of tokens, padding inside a combination."""
    model = Played(family)
    prompts = [encode(model, sample("0", "red"), config()), encode(model, sample("1", "blue"), config())]
    kept = [draws(prompts[0], 5), draws(prompts[1], 9)]
    kept[1][2, :2] = -1
    found = attempt(model, prompts, kept, config(), speaks=False)
    _, single, positions = case(family, "single")
    for number, (prompt, chosen, attempts) in enumerate(zip(prompts, kept, found, strict=True)):
        inputs = hf.batch(family, seed=number).inputs
        places = (single.video[0] >= 0).nonzero()[:, 0]
        assert torch.equal(prompt.video, places)
        for row, logits in zip(chosen, attempts.logits, strict=True):
            keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            keep[0, places] = False
            keep[0, places[row[row >= 0]]] = True
            _, wanted = full_run(model.network, inputs, keep, positions, prompt.answer[None])
            torch.testing.assert_close(logits, wanted[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_what_generation_says(family):
    model = Played(family)
    prompt = encode(model, sample("0", "red"), config())
    chosen = draws(prompt, 6)
    (found,) = attempt(model, [prompt], [chosen], config(max_new_tokens=4), speaks=True)
    for row, text in zip(chosen, found.texts, strict=True):
        best = torch.zeros(len(prompt.video)).scatter(0, row, 1.0)
        out = prune_inputs(model.network, hf.batch(family).inputs, lambda x, grid: best, num_tokens=6)  # noqa: B023
        said = model.network.generate(**out, max_new_tokens=4, do_sample=False)[:, -4:]
        assert text == model.tokenizer.batch_decode(said, True)[0]


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_step_moves_the_policy(family, tmp_path):
    model = Played(family)
    rows = [sample("0", "red"), sample("1", "blue")]
    start = ck.CompressionPolicy.from_language_model(model.network.get_decoder())
    before = {name: x.clone() for name, x in start.state_dict().items()}
    policy = Trainer(config(tmp_path, reward="log_prob", learning_rate=1e-2), model, rows, policy=start).train()
    moved = {name for name, x in policy.state_dict().items() if not torch.equal(x, before[name])}
    assert {name.split(".")[0] for name in moved} == {"layers", "layernorm", "token_compress", "frame_compress"}
    assert all(x.isfinite().all() for x in policy.state_dict().values())
    assert set(model.times) == {rows[0].timestamps}
    out = prune_inputs(model.network, hf.batch(family).inputs, policy, keep_ratio=0.5)
    assert model.network(**out).logits.isfinite().all()


def test_a_first_layer_that_is_no_pattern_for_a_policy(tmp_path):
    rows = [sample("0", "red")]
    with pytest.raises(UserError, match=r"policy: .*layers.0.mlp.gate_proj.* Give a policy's folder\.$") as caught:
        Trainer(config(tmp_path), Played("qwen3_vl_moe"), rows)
    assert "\n" not in str(caught.value)


def test_the_token_that_ends_an_answer_is_one(tmp_path):
    with pytest.raises(UserError, match=r"answer_end='<end>' is 5 tokens of this model"):
        Trainer(config(tmp_path, answer_end="<end>"), Played("video_llava"), [sample("0", "red")])
