"""The parts of a training step: configuration, data, samplers, memory, rollout, rewards, loss."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from training_toy import FRAMES, SIDE, ToyRows, toy_config, toy_model

import cacovid_kernels as ck
from cacovid_kernels.compressors.density import density_peaks
from cacovid_kernels.errors import UserError
from cacovid_kernels.integrations.transformers.prune import Flat
from cacovid_kernels.policy import PolicyScores
from cacovid_kernels.samples import BadRowError, Sample
from cacovid_kernels.training import config as config_module
from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.data import FileRows, Skipped, order_of_epoch, read_usable
from cacovid_kernels.training.losses import sample_loss
from cacovid_kernels.training.memory import Memory, adapted_keep_ratio
from cacovid_kernels.training.rewards import REWARDS, Attempts, answer_log_prob, exact_answer, same_text
from cacovid_kernels.training.rollout import attempt, encode, policy_batch
from cacovid_kernels.training.samplers import SAMPLERS, Scene

TOKENS = FRAMES * SIDE * SIDE


@pytest.fixture(scope="module")
def model():
    return toy_model()


# ---- configuration ------------------------------------------------------------------------------


def test_defaults_are_the_published_run():
    config = TrainConfig()
    assert (config.num_content, config.num_token, config.num_frame) == (1, 23, 8)
    assert (config.keep_ratio, config.frame_ratio, config.group_size, config.max_group_prob) == (0.02, 0.125, 2, 2)
    assert (config.num_iterations, config.easy_accuracy, config.hard_accuracy) == (5, 0.875, 0.125)
    assert (config.learning_rate, config.decoder_lr_scale, config.weight_decay) == (1e-6, 0.1, 0.01)
    assert (config.eps_low, config.eps_high, config.kl_weight, config.max_grad_norm) == (0.2, 0.28, 0, 5)
    assert config.mode == "strict"
    assert config.sampler == "gumbel"  # what the study found, not the paper's


def test_words_of_the_configuration_have_their_functions():
    assert tuple(SAMPLERS) == config_module.SAMPLERS
    assert tuple(REWARDS) == config_module.REWARDS


@pytest.mark.parametrize("suffix, text", [(".json", '{"num_token": 7, "keep_ratio": 1}'), (".toml", "num_token = 7")])
def test_configuration_files(tmp_path, suffix, text):
    file = tmp_path / f"train{suffix}"
    file.write_text(text)
    config = TrainConfig.from_file(file)
    assert config.num_token == 7
    assert isinstance(config.keep_ratio, float)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({"learning_rat": 1, "speed": 2}, "unknown learning_rat, speed"),
        ({"num_token": True}, "num_token=True must be int"),
        ({"num_token": 1.5}, "num_token=1.5 must be int"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3' must be float"),
        ({"policy": 3}, "policy=3 must be str or null"),
        ({"num_token": 0}, "num_token=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"mode": "paper"}, "mode='paper'"),
        ({"sampler": "random"}, "sampler='random'"),
        ({"kl_weight": 0.1}, "kl_weight=0.1"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_checkpoints": 1}, "keep_checkpoints=1"),
        ({"hard_accuracy": 0.9}, "hard_accuracy=0.9"),
        ({"min_keep_ratio": 0.2, "max_keep_ratio": 0.1}, "min_keep_ratio=0.2 must be at most max_keep_ratio=0.1"),
        ({"group_size": 0.0}, "group_size=0.0 must be above 0"),
        ({"group_size": -1.0}, "group_size=-1.0 must be above 0"),
    ],
)
def test_configuration_that_breaks_a_rule(values, words):
    with pytest.raises(UserError, match=words) as refused:
        TrainConfig.from_dict(values)
    assert "\n" not in str(refused.value)


def test_configuration_file_that_is_none(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name in ("broken.json", "list.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            TrainConfig.from_file(tmp_path / name)


# ---- data ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from cacovid_kernels.demo.render import render_clip

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    render_clip(path, seconds=0.5)
    return path


def test_rows_as_list_and_as_lines(clip):
    rows = [
        {"video": clip.name, "question": "what?", "answer": "red"},
        {"video": str(clip), "problem": " what? ", "solution": "x <answer> red </answer>", "problem_type": "free-form"},
    ]
    (clip.parent / "rows.json").write_text(json.dumps(rows))
    (clip.parent / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    for name in ("rows.json", "rows.jsonl"):
        found = FileRows(clip.parent / name, num_frames=3)
        assert len(found) == 2
        for i in range(2):
            sample = found[i]
            assert (sample.question, sample.answer, len(sample.frames)) == ("what?", "red", 3)
            assert f"{name} row {i}" in sample.name


def test_bad_rows_are_named(clip):
    file = clip.parent / "bad.jsonl"
    good = {"video": clip.name, "question": "what?", "answer": "red"}
    bad = [{**good, "video": "gone.mp4"}, {**good, "answer": " "}, {**good, "question": 3}, {"video": clip.name}, [1]]
    file.write_text("\n".join([*map(json.dumps, bad), "{not json", json.dumps(good)]))
    rows = FileRows(file, num_frames=2)
    for i, words in enumerate(
        ("gone.mp4 cannot be read", "answer must be", "question must be", "question", "table", "table")
    ):
        with pytest.raises(BadRowError, match=rf"bad\.jsonl row {i}\b.*{words}"):
            rows[i]
    assert rows[6].answer == "red"


def test_data_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        FileRows(tmp_path / "gone.json")


class _Flawed(ToyRows):
    def __init__(self, size: int, bad: set[int]) -> None:
        super().__init__(size)
        self.bad = bad

    def __getitem__(self, i: int, /) -> Sample:
        if i in self.bad:
            raise BadRowError(f"row {i}: broken")
        return super().__getitem__(i)


def test_a_bad_row_is_replaced_by_the_next_one_and_named_once(capsys):
    rows, skipped, order = _Flawed(5, {1, 2}), Skipped(2), [0, 1, 2, 3, 4]
    names = [read_usable(rows, order, place, skipped, lambda sample: sample.name) for place in (1, 2, 1, 4)]
    assert names == ["toy 3", "toy 3", "toy 3", "toy 4"]
    assert capsys.readouterr().err == "skipped: row 1: broken\nskipped: row 2: broken\n"


def test_too_many_bad_rows_end_the_run():
    with pytest.raises(UserError, match="2 bad rows, max_bad_rows=1"):
        read_usable(_Flawed(3, {0, 1}), [0, 1, 2], 0, Skipped(1), lambda sample: sample)
    with pytest.raises(UserError, match="none of the 2 rows"):
        read_usable(_Flawed(2, {0, 1}), [0, 1], 0, Skipped(9), lambda sample: sample)


def test_order_is_a_function_of_seed_and_epoch():
    first = order_of_epoch(50, 0, 7)
    assert sorted(first) == list(range(50))
    assert first == order_of_epoch(50, 0, 7)
    assert first != order_of_epoch(50, 1, 7)
    assert first != order_of_epoch(50, 0, 8)


# ---- memory -------------------------------------------------------------------------------------


def test_keep_ratio_follows_the_accuracy_within_its_limits():
    config = TrainConfig()
    assert adapted_keep_ratio(0.02, 0.875, config) == 0.01
    assert adapted_keep_ratio(0.01, 1.0, config) == 0.01
    assert adapted_keep_ratio(0.02, 0.8749, config) == 0.02
    assert adapted_keep_ratio(0.02, 0.125, config) == 0.04
    assert adapted_keep_ratio(0.08, 0.0, config) == 0.12
    wide = TrainConfig(keep_ratio=0.3)  # a start beyond the limits is a limit itself
    assert adapted_keep_ratio(0.3, 0.0, wide) == 0.3
    assert adapted_keep_ratio(0.3, 1.0, wide) == 0.15


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory_keeps_every_draw(sampler, scene):
    config = toy_config("", sampler=sampler, num_token=5, num_frame=3)
    memory, expected = Memory(0.125), {}
    for step, ratio in enumerate((0.125, 0.25)):
        draw = SAMPLERS[sampler](scene, ratio, step, config)
        rewards = torch.rand(len(draw.kept))
        memory.add(draw, rewards, rewards.tolist())
        for name, rows in draw.rows.items():
            expected.setdefault(name, []).append(rewards[rows])
    for name in memory.terms:
        assert torch.equal(memory.rewards[name], torch.cat(expected[name]))
        assert len(memory.terms[name].actions) == len(memory.rewards[name])
    assert memory.accuracy == pytest.approx(float(torch.cat(expected["token"]).mean()))


# ---- samplers -----------------------------------------------------------------------------------


@pytest.fixture
def scene():
    return Scene(torch.randn(TOKENS), torch.randn(FRAMES), torch.randn(TOKENS, 8), (FRAMES, SIDE, SIDE))


@pytest.mark.parametrize("mode", ["strict", "official"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_combination_keeps_the_same_number(sampler, mode, scene):
    config = toy_config("", sampler=sampler, mode=mode)
    draw = SAMPLERS[sampler](scene, 0.125, 5, config)
    assert draw.kept.shape == (config.num_combinations, TOKENS // 8)
    assert (draw.kept.diff(dim=1) > 0).all()
    assert (draw.kept >= 0).all()
    assert (draw.kept < TOKENS).all()
    assert sorted(i for rows in draw.rows.values() for i in range(rows.start, rows.stop)) == list(range(len(draw.kept)))
    again = SAMPLERS[sampler](scene, 0.125, 5, config)
    other = SAMPLERS[sampler](scene, 0.125, 6, config)
    assert torch.equal(draw.kept, again.kept)
    assert not torch.equal(draw.kept, other.kept)


def test_the_paper_s_space(scene):
    config = toy_config("", num_token=9, num_frame=5, num_content=2, frame_ratio=0.5)
    draw = SAMPLERS["combinations"](scene, 0.125, 0, config)
    per_frame = SIDE * SIDE
    content = density_peaks(scene.features.reshape(FRAMES, per_frame, -1), 2)
    content = (content + torch.arange(FRAMES)[:, None] * per_frame).flatten()
    assert draw.kept[draw.rows["content"]].tolist() == [content.tolist()] * 2
    assert set(draw.terms) == {"token", "frame"}
    masks = F.one_hot(draw.kept[draw.rows["token"]], TOKENS).sum(1)
    assert torch.equal(draw.terms["token"].actions, ck.pack_masks(masks))
    best = scene.tokens.reshape(FRAMES, per_frame).topk(2).indices + torch.arange(FRAMES)[:, None] * per_frame
    assert draw.kept[0].tolist() == best.flatten().sort().values.tolist()
    for kept, words in zip(draw.kept[draw.rows["frame"]], draw.terms["frame"].actions.tolist(), strict=True):
        frames = [t for t in range(FRAMES) if words[0] >> t & 1]
        assert len(frames) == 2
        inside = [t * per_frame + i for t in frames for i in range(per_frame)]
        peaks = density_peaks(scene.features[inside], kept.numel())
        assert kept.tolist() == [inside[i] for i in peaks]


def test_enough_frames_hold_the_tokens(scene):
    config = toy_config("", frame_ratio=0.25)
    draw = SAMPLERS["combinations"](scene, 0.5, 0, config)
    assert draw.kept.shape[1] == TOKENS // 2
    assert all(bin(words).count("1") == 2 for words in draw.terms["frame"].actions.flatten().tolist())


def test_at_least_one_token_is_kept(scene):
    for sampler in SAMPLERS:
        draw = SAMPLERS[sampler](scene, 0.001, 0, toy_config("", sampler=sampler))
        assert draw.kept.shape[1] >= 1


def test_plain_draws_are_ordered(scene):
    for sampler, rows in (("gumbel", FRAMES), ("gumbel_video", 1)):
        draw = SAMPLERS[sampler](scene, 0.125, 3, toy_config("", sampler=sampler))
        drawn = draw.terms["token"].actions
        assert drawn.shape == (11, rows, 8 // rows)
        flat = drawn + torch.arange(rows)[:, None] * (TOKENS // rows)
        assert torch.equal(flat.flatten(1).sort(1).values, draw.kept[draw.rows["token"]])


@pytest.mark.parametrize("ratio, count", [(0.125, 1), (0.5, 2)])
def test_plain_draws_of_frames(ratio, count, scene):
    draw = SAMPLERS["gumbel_video"](scene, ratio, 3, toy_config("", sampler="gumbel_video", num_frame=60))
    frames = draw.terms["frame"].actions
    assert frames.shape == (60, 1, count)
    assert {frame for row in frames[:, 0].tolist() for frame in row} == set(range(FRAMES))
    per_frame = SIDE * SIDE
    for kept, some in zip(draw.kept[draw.rows["frame"]], frames[:, 0].sort(1).values.tolist(), strict=True):
        inside = [t * per_frame + i for t in some for i in range(per_frame)]
        peaks = density_peaks(scene.features[inside], kept.numel())
        assert kept.tolist() == [inside[i] for i in peaks]
    tokens = draw.terms["token"].actions[:, 0, 0] // per_frame
    assert not torch.equal(tokens, frames[: len(tokens), 0, 0])  # noise of their own


# ---- loss ---------------------------------------------------------------------------------------


def _plain_loss(new, old, masks, rewards, config, balanced):
    """The published formula, in the order in which it is written down."""
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None]
    sign = torch.where(masks, 1.0, -1.0)
    log_prob, old_log_prob = F.logsigmoid(sign * new), F.logsigmoid(sign * old)
    ratio = (log_prob - old_log_prob).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * advantage)
    gap = torch.tensor(0.5).log() - log_prob
    loss = loss + config.kl_weight * (gap.exp() - gap - 1)
    if not balanced:
        return loss.mean()
    kept = masks.float()
    share = kept.mean(1, keepdim=True)
    weight = kept * (1 - share) + (1 - kept) * share
    return ((loss * weight).sum(1) / (weight.sum(1) + 1e-7)).mean()


def test_loss_over_several_draws(scene):
    config, memory = toy_config("", kl_weight=0.3), Memory(0.125)
    masks, rewards = {"token": [], "frame": []}, {"token": [], "frame": []}
    for step, ratio in enumerate((0.125, 0.25, 0.125)):
        draw = SAMPLERS["combinations"](scene, ratio, step, config)
        earned = torch.rand(len(draw.kept))
        memory.add(draw, earned, earned.tolist())
        found = ck.sample_combinations(
            scene.tokens, scene.frames, [scene.grid], num_samples=11, keep_ratio=ratio, num_frame_samples=4,
            frame_ratio=0.25, seed=config.seed, step=step,
        )  # fmt: skip
        for name, mask in (("token", found.mask()), ("frame", found.frame_mask())):
            masks[name].append(mask)
            rewards[name].append(earned[draw.rows[name]])
    old = PolicyScores(scene.tokens, scene.frames, torch.zeros(3))
    new = PolicyScores(*((x + 0.5 * torch.randn_like(x)).requires_grad_() for x in old))
    loss = sample_loss(new, old, memory, config)
    parts = [
        _plain_loss(a, b, torch.cat(masks[name]), torch.cat(rewards[name]), config, name == "token")
        for a, b, name in ((new.tokens, old.tokens, "token"), (new.frames, old.frames, "frame"))
    ]
    assert loss.item() == pytest.approx(sum(parts).item(), abs=1e-6)
    found = torch.autograd.grad(loss, [new.tokens, new.frames])
    expected = torch.autograd.grad(sum(parts), [new.tokens, new.frames])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["gumbel", "gumbel_video"])
def test_loss_of_ordered_draws_raises_what_was_rewarded(sampler, scene):
    config, memory = toy_config("", sampler=sampler, num_frame=20), Memory(0.125)
    for step, ratio in enumerate((0.125, 0.25)):
        draw = SAMPLERS[sampler](scene, ratio, step, config)
        wanted, frame = draw.kept[0, 0], draw.terms["frame"].actions[0, 0, 0]
        earned = (draw.kept == wanted).any(1).float()  # who keeps this token
        earned[draw.rows["frame"]] = (draw.terms["frame"].actions == frame).any(-1).any(-1).float()
        memory.add(draw, earned, earned.tolist())
    old = PolicyScores(scene.tokens, scene.frames, torch.zeros(3))
    tokens, frames = (x.clone().requires_grad_() for x in old[:2])
    sample_loss(PolicyScores(tokens, frames, old.modes), old, memory, config).backward()
    assert tokens.grad[wanted] < 0
    assert frames.grad[frame] < 0


# ---- rollout and rewards ------------------------------------------------------------------------


def _sample(question: str, answer: str, i: int = 0) -> Sample:
    return Sample(f"toy {i}", ToyRows()[i].frames, question, answer)


def test_prompts_of_a_batch_are_padded_for_the_policy(model):
    config = toy_config("")
    prompts = [encode(model, _sample(q, "red"), config) for q in ("what?", "what colour?")]
    policy = ck.CompressionPolicy.from_language_model(model.network.model.language_model).eval()
    together = policy(**policy_batch(prompts))
    for i, prompt in enumerate(prompts):
        alone = policy(**policy_batch([prompt]))
        torch.testing.assert_close(together.tokens.split(TOKENS)[i], alone.tokens)
        torch.testing.assert_close(together.frames.split(FRAMES)[i], alone.frames)


def test_one_forward_for_all_is_one_forward_for_each(model):
    """Different questions, answers and numbers of tokens, and padding inside a combination."""
    config = toy_config("", answer_end="")
    prompts = [encode(model, _sample("what?", "red"), config), encode(model, _sample("what colour?", "a"), config)]
    kept = [torch.stack([torch.randperm(TOKENS)[:k].sort().values for _ in range(3)]) for k in (5, 9)]
    kept[1][2, 0] = -1
    found = attempt(model, prompts, kept, config, speaks=False)
    for prompt, chosen, attempts in zip(prompts, kept, found, strict=True):
        length = len(prompt.answer)
        assert attempts.logits.shape[:2] == (3, length)
        for row, logits in zip(chosen.tolist(), attempts.logits, strict=True):
            places = sorted([*prompt.text.tolist(), *(int(prompt.video[i]) for i in row if i >= 0)])
            places += range(prompt.length, prompt.length + length - 1)
            output = model.network(
                inputs_embeds=prompt.tokens.inputs_embeds[places][None],
                position_ids=torch.tensor([places]),
                attention_mask=torch.ones(1, len(places), dtype=torch.int64),
            )
            torch.testing.assert_close(logits, output.logits[0, -length:], atol=1e-5, rtol=1e-4)


def test_exact_answer_is_what_generation_says(model):
    """The reward by one forward against generation: for right answers, wrong ones and right beginnings."""
    config = toy_config("", max_new_tokens=3, answer_end="")
    chosen = torch.stack([torch.randperm(TOKENS)[:6].sort().values for _ in range(4)])
    prompt = encode(model, _sample("what?", "abc"), config)
    (spoken,) = attempt(model, [prompt], [chosen], config, speaks=True)
    said = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in spoken.texts]
    right = next(ids for ids in said if len(ids) == 3)
    for ids in (right, right[:1], [right[0], 300 - right[1]], [right[0] ^ 1]):
        spoken = torch.tensor(ids[:-1], dtype=torch.int64)
        places = torch.arange(prompt.length, prompt.length + len(spoken))
        behind = Flat(spoken, model.network.get_input_embeddings()(spoken), places, torch.ones_like(spoken))
        tokens = (torch.cat([x[: prompt.length], y]) for x, y in zip(prompt.tokens, behind, strict=True))
        one = prompt._replace(answer=torch.tensor(ids), tokens=Flat(*tokens))
        (found,) = attempt(model, [one], [chosen], config, speaks=False)
        assert exact_answer(found).tolist() == [float(other[: len(ids)] == ids) for other in said]


def test_rewards_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 0.0]]])
    attempts = Attempts(_sample("?", "Red."), torch.zeros(2, 1), torch.tensor([0, 1]), logits, [" red\n", "reddish"])
    assert exact_answer(attempts).tolist() == [1, 0]
    p = torch.tensor([[2.0, 1.0], [2.0, -1.0]]).sigmoid().log()
    torch.testing.assert_close(answer_log_prob(attempts), p.mean(1))
    assert same_text(attempts).tolist() == [1, 0]


def test_questions_and_answers_that_cannot_be_asked(model):
    with pytest.raises(BadRowError, match=r"toy 0: .*<video>"):
        encode(model, _sample("what is <video>?", "red"), toy_config(""))
    with pytest.raises(BadRowError, match="toy 0: answer '' has no token"):
        encode(model, _sample("what?", ""), toy_config("", answer_end=""))
