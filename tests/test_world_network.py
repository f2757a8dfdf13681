"""The world's model: quick paths against Hugging Face's own, a run that resumes to the bit, the rules."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cacovid_kernels.demo.world import evaluate, rules, train_model
from cacovid_kernels.demo.world.network import (
    WorldGeometry,
    build_network,
    encode,
    hidden_states,
    patches,
    predict,
    prompts,
    world_batch,
)
from cacovid_kernels.demo.world.questions import ANSWERS, KINDS, ask, word_tokenizer
from cacovid_kernels.demo.world.scenery import paint
from cacovid_kernels.demo.world.scenes import WorldConfig, draw
from cacovid_kernels.errors import UserError
from cacovid_kernels.integrations.transformers.prompt import read
from cacovid_kernels.integrations.transformers.prune import compact
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.video_models import LlavaOneVision, load_model

WORLD = WorldConfig()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def network(tokenizer):
    return build_network(WorldGeometry(), tokenizer, seed=1).eval()


@pytest.fixture(scope="module")
def model(network, tokenizer):
    mean, std = train_model.OPENAI_CLIP_MEAN, train_model.OPENAI_CLIP_STD
    return LlavaOneVision(network, tokenizer, tuple(mean), tuple(std))


@torch.no_grad()
def test_encode_is_get_video_features(model):
    frames = paint(draw(7, [0, 1]))
    keep = torch.stack([torch.randperm(WORLD.tokens)[:40].sort().values for _ in range(2)])
    ours = encode(model.network, patches(frames), keep)
    for n in range(2):
        theirs = read(model.network, adapter_of(model.network), model.inputs(frames[n], "what")).video_embeds
        torch.testing.assert_close(ours[n], theirs[keep[n]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_questions_in_one_pass_are_as_one_by_one(model):
    scenes = draw(7, [4])
    asked = ask(scenes)
    prompt, frames = prompts(asked, model.tokenizer), paint(scenes)
    keep = torch.randperm(WORLD.tokens)[:50].sort().values[None]
    together = hidden_states(model.network, encode(model.network, patches(frames), keep), keep, WORLD.tokens, prompt)
    logits = model.network.get_output_embeddings()(together[0, prompt.asked])
    for kind, question in enumerate(asked.words[0]):
        whole = read(model.network, adapter_of(model.network), model.inputs(frames[0], question))
        alone, _ = compact(whole, keep[0], (50,))
        alone = model.network(
            inputs_embeds=alone.inputs_embeds, position_ids=alone.position_ids, attention_mask=alone.attention_mask
        )
        torch.testing.assert_close(logits[kind], alone.logits[0, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_of_the_last_word(network, tokenizer):
    kind, sample = next(rules.samples(network, tokenizer, WORLD, 3, 12))
    query, keys, mask = rules.last_query_and_keys(sample, 1)
    layer = network.model.language_model.layers[1].self_attn
    seen = {}
    handle = layer.o_proj.register_forward_pre_hook(lambda module, arguments: seen.update(mixed=arguments[0]))
    values = []
    other = layer.v_proj.register_forward_hook(lambda module, arguments, output: values.append(output))
    keep = torch.arange(WORLD.tokens).expand(len(sample.truth), -1)
    hidden_states(network, sample.embeddings, keep, WORLD.tokens, sample.prompt)
    handle.remove()
    other.remove()
    groups, length = keys.shape[1], keys.shape[2]
    rows = query.unflatten(1, (groups, -1)) @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    value = values[0][:, :length].unflatten(-1, (groups, -1)).transpose(1, 2)
    torch.testing.assert_close(
        (rows.softmax(-1) @ value).flatten(1), seen["mixed"][:, length - 1], atol=1e-5, rtol=1e-4
    )
    assert mask.sum() == WORLD.tokens
    assert kind == 0


def test_every_rule_keeps_the_count(network, tokenizer):
    for _, sample in rules.samples(network, tokenizer, WORLD, 3, 12):
        for name, rule in rules.RULES.items():
            for count in (1, 6, 29):
                keep = rule(sample, count)
                assert keep.shape == (2, count), name
                assert (keep[:, 1:] > keep[:, :-1]).all(), name
                assert keep.min() >= 0
                assert keep.max() < WORLD.tokens
        evidence = rules.RULES["evidence first"](sample, 29)
        assert (sample.truth.gather(1, evidence).sum(1) == sample.truth.sum(1)).all()


def test_wilson():
    low, high = evaluate.wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)


class _StoppedError(Exception):
    pass


def test_a_run_that_is_stopped_ends_in_the_same_weights(tmp_path):
    config = train_model.TrainConfig(
        steps=6, batch=2, warmup=2, align_steps=1, eval_every=2, eval_videos=2, learning_rate=0.01
    )
    straight = train_model.Trainer(config, tmp_path / "straight")
    straight.run()
    stopped = train_model.Trainer(config, tmp_path / "stopped")
    step, stopped.train_step = stopped.train_step, None

    def step_or_stop():
        if stopped.step == 3:
            raise _StoppedError
        return step()

    stopped.train_step = step_or_stop
    with pytest.raises(_StoppedError):
        stopped.run()
    resumed = train_model.Trainer(config, tmp_path / "stopped")
    resumed.run()
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("straight", "stopped")]
    for log in logs:
        assert [record.pop("step") for record in log] == [2, 4, 6]
        for record in log:
            record.pop("seconds")
    assert logs[0] == logs[1]

    exported = load_model(str(resumed.export()))
    batch = world_batch(1, range(4), exported.tokenizer, WORLD)
    everything = torch.arange(WORLD.tokens).expand(4, -1)
    network = exported.network.float()
    words = predict(
        network,
        hidden_states(network, encode(network, batch.patches, everything), everything, WORLD.tokens, batch.prompt),
        batch.prompt,
    )
    assert words.shape == (4, len(KINDS))
    assert set(ANSWERS) <= set(exported.tokenizer.get_vocab())

    with pytest.raises(UserError, match="another configuration"):
        train_model.Trainer(train_model.TrainConfig(seed=1), tmp_path / "straight").run()
