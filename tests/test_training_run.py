"""Whole runs: they learn, go on bit for bit when killed, agree over processes, and stop at what is no number."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file
from training_process import ROWS, finish, start
from training_toy import BRIGHT, FRAMES, ToyRows, keeps_bright, toy_config, toy_model

import cacovid_kernels as ck
from cacovid_kernels.cli import main
from cacovid_kernels.errors import UserError
from cacovid_kernels.samples import BadRowError
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.log import read_log
from cacovid_kernels.training.rewards import REWARDS, Attempts, Reward
from cacovid_kernels.training.rollout import encode, policy_batch
from cacovid_kernels.training.trainer import Trainer

STEPS = 30


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _curve(output) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "combinations_per_second"} for record in read_log(output)]


def _weights(output) -> dict[str, torch.Tensor]:
    return load_file(output / "policy" / "model.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["combinations", "gumbel", "gumbel_video"])
def test_it_learns_what_is_rewarded(sampler, model, tmp_path):
    config = toy_config(
        tmp_path, sampler=sampler, learning_rate=5e-3, max_steps=24, save_every=24, batch_size=4, num_token=9,
        num_frame=2,
    )  # fmt: skip
    policy = Trainer(config, model, ToyRows(256), reward=BRIGHT).train()
    curve = [record["reward/token"] for record in read_log(tmp_path)]
    first, last = np.mean(curve[:6]), np.mean(curve[-6:])
    assert first < 0.3, curve
    # The paper's space goes on exploring: no group of tokens is drawn more often than every other time.
    assert last > (0.4 if sampler == "combinations" else 0.9), curve
    # On videos that it has not seen, with a selection as users make it.
    found = []
    for i in range(500, 510):
        prompt = encode(model, ToyRows()[i], config)
        scores = policy(**policy_batch([prompt])).tokens.reshape(FRAMES, -1)
        attempts = Attempts(prompt.sample, ck.segmented_topk(scores, 2)[None], prompt.answer, None, None)
        found.append(keeps_bright(attempts).item())
    assert np.mean(found) > 0.9, found


def test_scalars_and_files_of_a_run(model, tmp_path, capfd):
    config = toy_config(tmp_path, max_steps=3)
    trainer = Trainer(config, model, ToyRows(), reward=BRIGHT)
    policy = trainer.train()
    records = read_log(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    for name in ("reward", "accuracy", "entropy", "kept_ratio", "combinations_per_second", "gradient_norm", "loss"):
        assert all(math.isfinite(record[name]) for record in records), name
    assert all(record["kept_ratio"] == 0.125 for record in records)
    assert {"reward/content", "reward/token", "reward/frame", "learning_rate"} <= records[0].keys()
    loaded = ck.CompressionPolicy.from_pretrained(tmp_path / "policy")
    assert _same(loaded.state_dict(), policy.state_dict())
    assert all(name.startswith("compression_policy.") for name in _weights(tmp_path))
    # A checkpoint is a policy too.
    ck.CompressionPolicy.from_pretrained(tmp_path / "checkpoints" / "step-00000003")
    said = capfd.readouterr().err
    assert "frozen model" in said
    assert "loss and backward" in said
    assert not list(tmp_path.rglob("*.tmp*"))
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pkl"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]


def test_learning_rates(model, tmp_path):
    config = toy_config(tmp_path, learning_rate=2.0, decoder_lr_scale=0.1, weight_decay=0.3, max_steps=4)
    trainer = Trainer(config, model, ToyRows(), reward=BRIGHT)
    updates = 4 * config.num_iterations
    found = [trainer._learning_rate(update) for update in range(updates)]
    assert found == pytest.approx([1 + math.cos(math.pi * u / updates) for u in range(updates)])
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["scale"] == (0.1 if name.startswith("layers.") else 1.0)
            assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)
    assert seen == {name for name in names.values() if not name.startswith("mode_selection.")}
    published = Trainer(dataclasses.replace(config, mode="official"), model, ToyRows(), reward=BRIGHT)
    assert published._learning_rate(4) == pytest.approx(0)  # sized by samples, stepped with every update
    assert published._learning_rate(8) == pytest.approx(4.0 / 2)


def test_the_configuration_has_the_last_word_on_accumulation(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    trainer = Trainer(toy_config(tmp_path, gradient_accumulation=2), model, ToyRows())
    assert trainer.accelerator.gradient_accumulation_steps == 2


def test_deepspeed_is_refused(model, tmp_path):
    class Other:
        distributed_type = DistributedType.DEEPSPEED

    with pytest.raises(UserError, match="Use an FSDP configuration"):
        Trainer(toy_config(tmp_path), model, ToyRows(), accelerator=Other())


def test_hard_and_easy_samples_change_what_is_kept(model, tmp_path):
    for reward, expected in ((0.0, (0.125 + 0.25 + 0.25) / 3), (1.0, (0.125 + 0.0625 + 0.0625) / 3)):
        shutil.rmtree(tmp_path)
        config = toy_config(tmp_path, num_iterations=3, min_keep_ratio=0.0625, max_keep_ratio=0.25, max_steps=1)
        always = Reward(*[lambda attempts, reward=reward: torch.full((len(attempts.kept),), reward)] * 2)
        Trainer(config, model, ToyRows(), reward=always).train()
        assert _curve(tmp_path)[0]["kept_ratio"] == pytest.approx(expected)


def test_the_policy_to_start_from(model, tmp_path):
    ck.CompressionPolicy.from_language_model(model.network.model.language_model).save_pretrained(tmp_path / "right")
    ck.CompressionPolicy(ck.PolicyConfig(32, 64, 4, 2)).save_pretrained(tmp_path / "narrow")
    trainer = Trainer(toy_config(tmp_path, policy=str(tmp_path / "right")), model, ToyRows())
    assert _same(trainer.policy.state_dict(), ck.CompressionPolicy.from_pretrained(tmp_path / "right").state_dict())
    with pytest.raises(UserError, match=r"hidden_size=32, the model 64"):
        Trainer(toy_config(tmp_path, policy=str(tmp_path / "narrow")), model, ToyRows())
    with pytest.raises(UserError, match=r"gone cannot be loaded"):
        Trainer(toy_config(tmp_path, policy=str(tmp_path / "gone")), model, ToyRows())
    # Without one, it depends on the seed alone.
    a, b, c = (Trainer(toy_config(tmp_path, seed=seed), model, ToyRows()).policy.state_dict() for seed in (1, 1, 2))
    assert _same(a, b)
    assert not _same(a, c)


@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_trains(reward, model, tmp_path):
    config = toy_config(tmp_path, reward=reward, max_new_tokens=2, max_steps=1, answer_end="")
    Trainer(config, model, ToyRows()).train()
    (record,) = _curve(tmp_path)
    assert record["reward"] < 0 if reward == "log_prob" else 0 <= record["reward"] <= 1


# ---- stopping and going on ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nobody stopped."""
    output = tmp_path_factory.mktemp("uninterrupted")
    finish(start(_lively(output)))
    return output


def _lively(output, **changes) -> TrainConfig:
    """Steps large enough that a bit lost anywhere shows in the next loss."""
    return toy_config(output, **{"learning_rate": 4e-3, "max_steps": STEPS, "save_every": 1, **changes})


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.nightly)])
def test_killed_at_random_it_goes_on_bit_for_bit(kills, uninterrupted, tmp_path):
    config = _lively(tmp_path)
    if kills > 8:
        uninterrupted = tmp_path / "uninterrupted"
        config = _lively(tmp_path / "killed", max_steps=4 * kills, learning_rate=1e-3)
        finish(start(dataclasses.replace(config, output=str(uninterrupted))))
    tmp_path = Path(config.output)
    drawn = config.batch_size * config.num_iterations * config.num_combinations
    step_seconds = drawn / np.median([record["combinations_per_second"] for record in read_log(uninterrupted)])
    rng, progress = np.random.default_rng(kills), [0]
    for kill in range(kills):
        (process,) = start(config, until=progress[-1] + (config.max_steps - 1) // kills)
        if kill % 4 != 3:  # the others die before they are ready
            while len(read_log(tmp_path)) <= progress[-1] and process.is_alive():
                time.sleep(0.005)
        process.join(float(rng.uniform(0.0, 2 * step_seconds)))
        assert process.is_alive(), "it must not end before it is killed"
        process.kill()
        process.join()
        progress.append(len(read_log(tmp_path)))
    assert progress[-1] >= kills * 3 // 4
    finish(start(config))
    assert _curve(tmp_path) == _curve(uninterrupted)
    assert _same(_weights(tmp_path), _weights(uninterrupted))


def test_a_damaged_checkpoint_costs_its_steps_alone(uninterrupted, tmp_path, model, capfd):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08d}"
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 4
    (newest / "optimizer.safetensors").write_bytes(data)
    Trainer(_lively(tmp_path), model, ToyRows(ROWS), reward=BRIGHT).train()
    said = capfd.readouterr().err
    assert f"skipped: {newest}: optimizer.safetensors has changed" in said
    assert f"resumed after step {STEPS - 1}" in said
    assert _curve(tmp_path) == _curve(uninterrupted)
    assert _same(_weights(tmp_path), _weights(uninterrupted))


def test_other_settings_are_refused_by_name(uninterrupted, tmp_path, model):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    changed = dataclasses.replace(_lively(tmp_path), eps_low=0.1, batch_size=1, save_every=3)
    with pytest.raises(UserError, match=r"eps_low was 0\.2 and is 0\.1; samples per step were 2 and are 1\."):
        Trainer(changed, model, ToyRows(ROWS), reward=BRIGHT).train()


def test_two_processes_are_one(uninterrupted, tmp_path):
    """The same global batch in two processes, in two passes of one, and handed from two to one in between."""
    two, one = tmp_path / "two", tmp_path / "one"
    finish(start(_lively(two, batch_size=1), processes=2))
    finish(start(_lively(one, batch_size=1, gradient_accumulation=2)))
    assert _curve(two) == _curve(one)
    assert _same(_weights(two), _weights(one))
    shutil.rmtree(two / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(two / "policy")
    finish(start(_lively(two, batch_size=1, gradient_accumulation=2)))
    assert _curve(two) == _curve(one)
    assert _same(_weights(two), _weights(one))
    # One pass of two samples pads and sums in another order.
    for a, b in zip(_curve(two)[:4], _curve(uninterrupted)[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-8)


# ---- what is no number, what is no row ----------------------------------------------------------


def test_a_reward_that_is_none_names_its_sample(model, tmp_path):
    def none(attempts):
        return torch.full((len(attempts.kept),), float("nan") if attempts.sample.name == "toy 5" else 1.0)

    config = toy_config(tmp_path, max_steps=0, batch_size=1)
    with pytest.raises(FloatingPointError, match=r"the reward of toy 5 is not finite"):
        Trainer(config, model, ToyRows(8), reward=Reward(none, none)).train()


def test_a_loss_that_is_none_names_its_sample(model, tmp_path):
    class Rows(ToyRows):
        def __getitem__(self, i):
            return dataclasses.replace(super().__getitem__(i), name=f"toy {i}")

    config = toy_config(tmp_path, max_steps=1, save_every=1)
    trainer = Trainer(config, model, Rows(8), reward=BRIGHT)
    with torch.no_grad():
        trainer.policy.token_compress[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss of toy \d is nan"):
        trainer.train()
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "policy").exists()


def test_bad_rows_are_skipped_while_training(model, tmp_path, capfd):
    class Rows(ToyRows):
        def __getitem__(self, i):
            if i % 4 == 1:
                raise BadRowError(f"row {i}: broken")
            return super().__getitem__(i)

    config = toy_config(tmp_path, max_steps=0, batch_size=1, max_bad_rows=2)
    trainer = Trainer(config, model, Rows(8), reward=BRIGHT)
    trainer.train()
    assert trainer.steps == 8
    assert len(trainer.skipped.reasons) == 2
    said = capfd.readouterr().err
    assert said.count("row 1: broken") == said.count("row 5: broken") == 1


# ---- the command --------------------------------------------------------------------------------


def test_command(model, tmp_path, capsys):
    from cacovid_kernels.demo.render import render_clip

    render_clip(tmp_path / "clip.mp4", seconds=0.5)
    rows = [{"video": "clip.mp4", "question": "what?", "answer": word} for word in ("red", "blue")]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"video": "gone.mp4", "question": "?", "answer": "x"}]))
    model.network.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(normal))
    config = dataclasses.replace(
        toy_config(tmp_path / "run", num_frames=3, max_steps=0, batch_size=1),
        data=str(tmp_path / "rows.json"),
        model=str(tmp_path / "model"),
    )
    file = tmp_path / "train.json"
    file.write_text(json.dumps(config.to_dict()))
    assert main(["train", "--config", str(file)]) == 0
    output = capsys.readouterr()
    assert "after 3 steps; bad rows: 1" in output.out
    assert "rows.json row 2 (gone.mp4)" in output.err
    ck.CompressionPolicy.from_pretrained(tmp_path / "run" / "policy")


@pytest.mark.parametrize(
    "values, words", [({"speed": 1}, "unknown speed"), ({"data": "gone.json"}, "gone.json cannot be read")]
)
def test_command_refuses_in_one_line(values, words, tmp_path, capsys):
    file = tmp_path / "train.json"
    file.write_text(json.dumps(values))
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
