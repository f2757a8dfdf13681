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
from cacovid_kernels.samples import BadRowError
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_a_combination_does_not_matter(family):
    """Features that enter again in the first layers go to their own tokens."""
    model = Played(family)
    prompt = encode(model, sample("0", "red"), config())
    chosen = draws(prompt, 5)
    chosen[1, :2] = -1
    shuffled = chosen[:, [3, 1, 4, 0, 2]]
    (found,), (wanted,) = (attempt(model, [prompt], [kept], config(), speaks=False) for kept in (shuffled, chosen))
    assert torch.equal(found.logits, wanted.logits)


class Changed(Played):
    """A processor whose first prompt is put through a function."""

    def __init__(self, family, change):
        super().__init__(family)
        self.change = change

    def inputs(self, frames, question, timestamps=None):
        inputs = super().inputs(frames, question, timestamps)
        return self.change(inputs) if question == "0" else inputs


def with_placeholder(inputs):
    more = torch.tensor([[hf.VIDEO, 5]])
    for name, value in (("input_ids", more), ("attention_mask", more.sign()), ("mm_token_type_ids", more * 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], value], 1)
    return inputs


def refusing(_):
    raise ValueError("no such video\nat all")


def two_videos(_):
    return hf.batch("llava_onevision", [[("video", 4), ("text", 2), ("video", 4), ("text", 3)]]).inputs


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_placeholder, r"the prompts have \d+ video placeholders"),
        (refusing, "no such video$"),
        (two_videos, "the prompt holds 2 videos, a row must hold one"),
    ],
)
def test_a_prompt_that_is_refused_is_a_bad_row(family, change, message, tmp_path, capsys):
    if change is two_videos:
        family = "llava_onevision"
    model, rows = Changed(family, change), [sample("0", "red"), sample("1", "blue")]
    with pytest.raises(BadRowError, match=rf"^prompt 0: .*{message}") as caught:
        encode(model, rows[0], config())
    assert "\n" not in str(caught.value)
    Trainer(config(tmp_path, reward="log_prob"), model, rows).train()
    assert capsys.readouterr().err.count("skipped: prompt 0: ") == 1


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("answer", ["#", "a#b", "a#"])
def test_an_answer_with_a_placeholder_is_a_bad_row(family, answer):
    model = Played(family)
    placeholder = hf.IMAGE if family == "internvl" else hf.VIDEO
    model.tokenizer = lambda text, add_special_tokens: {"input_ids": [placeholder if c == "#" else 20 for c in text]}
    with pytest.raises(BadRowError, match=rf"^prompt 0: answer '{answer}' holds .* \(token {placeholder}\)\. Take it"):
        encode(model, sample("0", answer), config())


def test_a_model_of_no_family_is_no_bad_row():
    model = Played("llava_onevision")
    model.network = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no adapter for Linear"):
        encode(model, sample("0", "red"), config())


def test_a_first_layer_that_is_no_pattern_for_a_policy(tmp_path):
    rows = [sample("0", "red")]
    with pytest.raises(UserError, match=r"policy: .*layers.0.mlp.gate_proj.* Give a policy's folder\.$") as caught:
        Trainer(config(tmp_path), Played("qwen3_vl_moe"), rows)
    assert "\n" not in str(caught.value)


def test_the_token_that_ends_an_answer_is_one(tmp_path):
    with pytest.raises(UserError, match=r"answer_end='<end>' is 5 tokens of this model"):
        Trainer(config(tmp_path, answer_end="<end>"), Played("video_llava"), [sample("0", "red")])
