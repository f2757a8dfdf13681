"""Compressed prompts in the modes of `generate`: beams, samples, caches, batches, a second question, no trace."""

from __future__ import annotations

import copy
import weakref

import hf_models as hf
import pytest
import torch
import transformers
from test_hf_oracle import case, full_run, kept_tokens, scores

from cacovid_kernels.integrations.transformers import compress, context, next_turn, prune_inputs

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def answers(family, batch, **options):
    """New tokens `[B, G]` with half of the video."""
    with compress(hf.tiny(family), scores, keep_ratio=0.5):
        return hf.tiny(family).generate(**batch.inputs, **options)[:, batch.inputs["input_ids"].shape[1] :]


def row_of(batch_rows, row):
    """One row of a ragged batch as a batch of its own, with the same pixels and text."""
    family, rows = batch_rows
    everything = hf.batch(family, rows)
    inputs = {}
    mask = everything.inputs["attention_mask"][row].bool()
    videos = [sum(item[0] == "video" for item in items) for items in rows]
    mine = slice(sum(videos[:row]), sum(videos[: row + 1]))
    for name, value in everything.inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = value[row : row + 1, mask]
        elif not name.startswith("pixel") or family in ("llava_onevision", "llava_next_video", "video_llava"):
            inputs[name] = value[mine]  # one entry per video
        elif family == "internvl":
            inputs[name] = value.unflatten(0, (-1, 4))[mine].flatten(0, 1)
        elif family == "smolvlm":
            inputs[name] = value[row : row + 1, : 4 * videos[row]]
        else:
            sizes = everything.inputs["video_grid_thw"].prod(-1).tolist()
            inputs[name] = torch.cat(value.split(sizes)[mine])
    return hf.Batch(inputs, everything.video[row : row + 1, mask])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_rows_of_a_batch_answer_as_alone(family):
    together = answers(family, hf.batch(family, hf.RAGGED), **GREEDY)
    for row in range(3):
        assert torch.equal(together[row : row + 1], answers(family, row_of((family, hf.RAGGED), row), **GREEDY))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_beams_and_samples_of_a_batch_are_those_of_its_rows(family):
    whole = hf.batch(family, hf.RAGGED)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = answers(family, whole, **beams).unflatten(0, (3, 2))
    for row in range(3):
        assert torch.equal(together[row], answers(family, row_of((family, hf.RAGGED), row), **beams))
    assert not torch.equal(together[:, 0], together[:, 1])
    torch.manual_seed(5)
    sampled = answers(family, whole, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    torch.manual_seed(5)
    assert torch.equal(sampled, answers(family, whole, max_new_tokens=NEW, do_sample=True, num_return_sequences=2))
    assert not torch.equal(sampled[::2], sampled[1::2])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_static_cache_gives_the_same_answer(family):
    batch = hf.batch(family, hf.RAGGED)
    static = answers(family, batch, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, answers(family, batch, **GREEDY))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_second_question_on_the_compressed_cache(family):
    """As at full length under the mask, in a ragged batch, one row of which got a shorter question."""
    model, batch, positions = case(family, "ragged")
    keep = kept_tokens(family, "ragged", 0.5)
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    first = model.generate(**out, **GREEDY, return_dict_in_generate=True)
    answer = first.sequences[:, -NEW:]
    question = torch.randint(10, 140, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, NEW + 5, dtype=torch.int64)
    question[1, :2], mask[1, NEW : NEW + 2] = hf.PAD, 0
    turn = next_turn(out, first.past_key_values, torch.cat([answer, question], 1), mask)
    second = model.generate(**turn, **GREEDY, return_dict_in_generate=True, output_logits=True)
    found = second.sequences[:, -NEW:]

    plain = {key: value for key, value in batch.inputs.items() if key not in ("visuals", "attention_mask")}
    prompt = model(**plain, attention_mask=keep.long(), position_ids=positions, use_cache=True)
    rest = torch.cat([answer, question, found[:, :-1]], 1)
    visible = torch.cat([mask, torch.ones(3, NEW - 1, dtype=torch.int64)], 1)
    full = model(
        input_ids=rest,
        attention_mask=torch.cat([keep.long(), visible], 1),
        position_ids=positions[..., -1:] + visible.cumsum(1),
        past_key_values=prompt.past_key_values,
    )
    torch.testing.assert_close(torch.stack(second.logits, 1), full.logits[:, -NEW:], atol=1e-5, rtol=0)

    # A third one goes on from the second's arguments.
    more = torch.cat([found, torch.full((3, 2), 77)], 1)
    third = next_turn(turn, second.past_key_values, more)
    assert third["input_ids"].tolist() == more[:, NEW - 1 :].tolist()
    assert torch.equal(third["position_ids"][..., 0], turn["position_ids"][..., -1] + NEW)
    assert third["attention_mask"].shape[1] == second.past_key_values.get_seq_length() + 3


def test_a_cache_of_another_prompt_is_refused():
    model, batch, _ = case("llava_onevision", "single")
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    cache = model.generate(**out, **GREEDY, return_dict_in_generate=True).past_key_values
    longer = prune_inputs(model, batch.inputs, scores, keep_ratio=1.0)
    with pytest.raises(ValueError, match=r"next_turn: the cache holds 22 tokens, it must hold the 25 of the prompt"):
        next_turn(longer, cache, torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_ids \[2, 9\] and attention_mask \[2, 9\] must be \[B=1, S\]"):
        next_turn(out, cache, torch.ones(2, 9, dtype=torch.int64))


def state_of(model):
    """Everything a run could leave behind: attributes, hooks, parameters' identities, in every module."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                value = {k: id(v) for k, v in value.items()}
            found[name, key] = value if isinstance(value, (dict, int, float, bool, str, type(None))) else id(value)
    return found


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_no_trace_is_left(family):
    model, batch = copy.deepcopy(hf.tiny(family)), hf.batch(family)
    before, config = state_of(model), (model.config.to_dict(), model.generation_config.to_dict())
    with compress(model, scores, keep_ratio=0.5) as compression:
        assert "generate" in vars(model)
        model.generate(**batch.inputs, **GREEDY)
    assert compression.kept
    assert state_of(model) == before

    def fails(embeds, grid):
        raise KeyError("scores")

    with pytest.raises(KeyError, match="scores"), compress(model, fails, keep_ratio=0.5):
        model.generate(**batch.inputs, **GREEDY)
    assert state_of(model) == before
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert model.generate.__func__ is type(model).generate


def test_a_model_with_a_generate_of_its_own_gets_it_back():
    model = copy.deepcopy(hf.tiny("llava_onevision"))
    model.generate = own = lambda *args, **kwargs: "own"
    with compress(model, scores, keep_ratio=0.5):
        assert model.generate is not own
    assert vars(model)["generate"] is own


def test_the_whole_prompt_is_gone_before_the_answer(monkeypatch):
    family, read = "llava_onevision", context.read
    model, seen, alive = copy.deepcopy(hf.tiny(family)), [], []

    def reading(*args):
        prompt = read(*args)
        seen.append(weakref.ref(prompt))
        return prompt

    monkeypatch.setattr(context, "read", reading)
    model.generate = lambda *args, **kwargs: alive.append(seen[0]()) or kwargs["input_ids"]
    with compress(model, scores, keep_ratio=0.5):
        model.generate(**hf.batch(family).inputs)
    assert alive == [None]


def test_the_call_looks_as_without_compression():
    """Whole prompts in front, lengths counted along them, processors see their text, ids may come by position."""
    family, batch = "llava_onevision", hf.batch("llava_onevision")
    model, ids = hf.tiny(family), batch.inputs["input_ids"]
    rest = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    length = ids.shape[1]
    with compress(model, scores, keep_ratio=0.5) as compression:
        greedy = model.generate(**batch.inputs, **GREEDY)
        assert torch.equal(model.generate(ids, **rest, **GREEDY), greedy)
        assert torch.equal(model.generate(**batch.inputs, max_length=length + NEW, do_sample=False), greedy)
        config = transformers.GenerationConfig(max_length=length + NEW, pad_token_id=hf.PAD)
        assert torch.equal(model.generate(**batch.inputs, generation_config=config), greedy)
        first = greedy[0, length].item()
        stopped = {"eos_token_id": first, "do_sample": False, "max_new_tokens": NEW}
        assert model.generate(**batch.inputs, **stopped).shape[1] == length + 1
        assert model.generate(**batch.inputs, **stopped, min_length=length + 3).shape[1] >= length + 3
        assert torch.equal(model.generate(**batch.inputs, **GREEDY, min_length=1), greedy)
        repeated = model.generate(**batch.inputs, **GREEDY, bad_words_ids=[[ids[0, -1].item(), first]])
        assert repeated[0, length] != first  # the pair starts with the prompt's last word
        assert compression.kept == (8,)
        assert compression.inputs["attention_mask"].shape == (1, length - 8)
    assert torch.equal(greedy[:, :length], ids)


def test_calls_without_a_video_run_as_they_are():
    model, ids = hf.tiny("qwen2_5_vl"), torch.tensor([[1, 2, 3]])
    wanted = model.generate(ids, **GREEDY)
    with compress(model, scores, keep_ratio=0.5) as compression:
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), wanted)
    assert compression.inputs is None


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding guesses"),
        ({"assistant_model": object()}, "assisted decoding guesses"),
        ({"assistant_early_exit": 1}, "assisted decoding guesses"),
        ({"prefill_chunk_size": 4}, "chunks are cut from the ids"),
        ({"generation_config": transformers.GenerationConfig(prefill_chunk_size=4)}, "chunks are cut from the ids"),
    ],
)
def test_modes_that_need_whole_prompts_are_refused_with_the_reason(option, reason):
    model, batch = hf.tiny("llava_onevision"), hf.batch("llava_onevision")
    with (
        compress(model, scores, keep_ratio=0.5),
        pytest.raises(ValueError, match=f"compress: .* is set, but {reason}.* Leave it out") as caught,
    ):
        model.generate(**batch.inputs, **option)
    assert "\n" not in str(caught.value)


# ---- silent traps: each guard is taken away to see that it was needed ----------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in hf.FAMILIES if name not in hf.MROPE_FAMILIES])
def test_without_the_explicit_mask_gaps_in_positions_split_the_prompt(family, attention):
    _, batch, positions = case(family, "single")
    model = copy.deepcopy(hf.tiny(family))
    model.set_attn_implementation(attention)
    keep = kept_tokens(family, "single", 0.5)
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    wanted, _ = full_run(model, batch.inputs, keep, positions, torch.full((1, 2), 7))
    guarded = model(**out, use_cache=False).logits
    torch.testing.assert_close(guarded[0], wanted[0, keep[0]], atol=1e-5, rtol=0)
    bare = model(**{**out, "attention_mask": None}, use_cache=False).logits
    assert (bare[0, -1] - wanted[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_without_a_row_of_text_positions_time_is_read_as_packed_sequences(family):
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    model, batch, positions = case(family, "single")
    keep = kept_tokens(family, "single", 0.5)
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    wanted, _ = full_run(model, batch.inputs, keep, positions, torch.full((1, 2), 7))
    # `generate` drops a mask of ones, as here; then positions alone say what a sequence is.
    guarded = model(**{**out, "attention_mask": None}, use_cache=False).logits
    torch.testing.assert_close(guarded[0], wanted[0, keep[0]], atol=1e-5, rtol=0)
    assert not _is_packed_sequence(out["position_ids"][0], 1)

    time = torch.cat([out["position_ids"][1:2], out["position_ids"][1:]])
    bare = model(**{**out, "attention_mask": None, "position_ids": time}, use_cache=False).logits
    assert (bare[0, -1] - wanted[0, -1]).abs().max() > 1e-3
    assert _is_packed_sequence(time[0], 1)


def test_positions_start_at_zero_where_the_video_came_first():
    """Variable-length attention finds the starts of sequences by their positions, some versions by position 0."""
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    model = hf.tiny("llava_onevision")
    batch = hf.batch("llava_onevision", [[("video", 4), ("text", 4)]])
    last = prune_inputs(model, batch.inputs, lambda x, grid: torch.arange(len(x)).float(), num_tokens=3)
    assert last["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]  # three tokens, the newline, the text
    ends = torch.arange(16).remainder(15) == 0
    gap = prune_inputs(model, batch.inputs, lambda x, grid: ends.float(), num_tokens=2)
    assert gap["position_ids"].tolist() == [[0, 15, 16, 17, 18, 19, 20]]
    (borders, _), _ = prepare_fa_kwargs_from_position_ids(gap["position_ids"])
    assert borders.tolist() == [0, 7]
