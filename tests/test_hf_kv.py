"""Dropping tokens after the prompt was read is decoding on the full cache in which nobody sees them any more."""

from __future__ import annotations

import copy
from functools import lru_cache

import hf_models as hf
import pytest
import torch
import transformers
from test_hf_generate import row_of, state_of
from test_hf_oracle import case, kept_tokens, scores

from cacovid_kernels.compressors import divprune
from cacovid_kernels.integrations.transformers import compress, next_turn

STEPS = 16
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
TELL = {"return_dict_in_generate": True, "output_logits": True}
SOME = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")


@lru_cache
def plain_run(family, name):
    """Prompts read by the untouched model, with the attention matrix of the last layer `[B, H, L, L]`."""
    model, batch, positions = case(family, name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = {key: value for key, value in batch.inputs.items() if key != "visuals"}
    read = eager(**inputs, position_ids=positions, output_attentions=True)
    options = {**GREEDY, **TELL}
    return read.attentions[-1], model.generate(**inputs, **options)


def kept_by_attention(family, name, ratio):
    """`[B, L]` bool: what must be left, from the whole attention matrix."""
    attention, (_, batch, _) = plain_run(family, name)[0], case(family, name)
    keep = batch.inputs["attention_mask"].bool()
    for row, videos in enumerate(batch.video):
        behind = int((videos >= 0).nonzero()[-1]) + 1
        every = attention[row, :, behind:].mean((0, 1))
        for video in set(videos[videos >= 0].tolist()):
            places = (videos == video).nonzero()[:, 0]
            keep[row, places] = False
            keep[row, places[every[places].topk(max(1, int(ratio * len(places)))).indices]] = True
    return keep


def masked_run(family, name, keep, answer, more=None):
    """Logits `[B, S, V]` of every step of an answer: the prompt sees itself whole, the answer what `keep` leaves."""
    model, batch, positions = case(family, name)
    inputs = {key: value for key, value in batch.inputs.items() if key != "visuals"}
    prompt = model(**inputs, position_ids=positions, use_cache=True)
    steps = answer[:, :-1]
    visible = torch.ones_like(steps) if more is None else more
    rest = model(
        input_ids=steps,
        attention_mask=torch.cat([keep.long(), visible], 1),
        position_ids=positions[..., -1:] + visible.cumsum(1),
        past_key_values=prompt.past_key_values,
    )
    return torch.cat([prompt.logits[:, -1:], rest.logits], 1)


def answered(family, name, selector=None, **options):
    model, batch, _ = case(family, name)
    ratio = options.pop("keep_ratio", 0.5)
    with compress(model, selector, keep_ratio=ratio, stage="kv") as compression:
        found = model.generate(**batch.inputs, **{**GREEDY, **TELL, **options})
    return found, compression


def check(family, name, found, keep):
    answer, batch = found.sequences[:, -STEPS:], case(family, name)[1]
    assert torch.equal(found.sequences[:, :-STEPS], batch.inputs["input_ids"])
    wanted = masked_run(family, name, keep, answer)
    torch.testing.assert_close(torch.stack(found.logits, 1), wanted, atol=1e-5, rtol=0)
    assert torch.equal(answer, wanted.argmax(-1))
    for layer in found.past_key_values.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == int(keep.sum(1).max()) + STEPS - 1


@pytest.mark.parametrize("ratio", [0.5, 0.1])
@pytest.mark.parametrize("name", ["single", "ragged"])
@pytest.mark.parametrize("family", [*hf.FAMILIES, "qwen3_vl_moe"])
def test_as_decoding_on_a_masked_cache(family, name, ratio):
    found, _ = answered(family, name, keep_ratio=ratio)
    check(family, name, found, kept_by_attention(family, name, ratio))


@pytest.mark.parametrize("family", SOME)
def test_of_a_long_text_the_last_64_tokens_are_asked(family):
    """As the attention matrix of the whole prompt has it; more or fewer of its rows would keep other tokens."""
    model, batch = hf.tiny(family), hf.batch(family, [[("text", 3), ("video", 30), ("text", 120)]])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attention = eager(**batch.inputs, output_attentions=True).attentions[-1][0]
    video = batch.video[0] >= 0
    places = video.nonzero()[:, 0]

    def left(rows):
        best = attention[:, -rows:].mean((0, 1))[places].topk(len(places) // 2).indices
        return (~video).scatter(0, places[best], True).nonzero()[:, 0]

    with compress(model, keep_ratio=0.5, stage="kv") as compression:
        model.generate(**batch.inputs, max_new_tokens=1)
    columns = compression.inputs["position_ids"].reshape(-1, len(left(64)))[0]  # the axis that serves masks counts
    assert torch.equal(columns, left(64))
    for other in (1, 48, 80, 120):
        assert not torch.equal(columns, left(other))


@pytest.mark.parametrize("name", ["single", "ragged"])
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_keeping_all_is_the_untouched_model_bit_for_bit(family, name):
    found, _ = answered(family, name, keep_ratio=1.0)
    wanted = plain_run(family, name)[1]
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("name", ["ragged", "mixed"])
@pytest.mark.parametrize("family", SOME)
def test_a_selector_chooses_as_before_the_model(family, name):
    found, compression = answered(family, name, scores)
    keep = kept_tokens(family, name, 0.5)
    check(family, name, found, keep)
    assert torch.equal(compression.inputs["attention_mask"].sum(1), keep.sum(1))


@pytest.mark.parametrize("family", SOME)
def test_the_comparison_can_fail(family):
    """The masked run depends on what is masked, on when, and on what is asked."""
    found, _ = answered(family, "single")
    keep, answer = kept_by_attention(family, "single", 0.5), found.sequences[:, -STEPS:]
    wanted = masked_run(family, "single", keep, answer)
    everything = masked_run(family, "single", torch.ones_like(keep), answer)
    assert torch.equal(wanted[:, 0], everything[:, 0])
    assert (wanted - everything)[:, 1:].abs().max() > 1e-3
    assert not torch.equal(keep, kept_tokens(family, "single", 0.5))


def test_the_memory_is_returned():
    found, compression = answered("qwen2_5_vl", "ragged", max_new_tokens=1, keep_ratio=0.1)
    kept = kept_by_attention("qwen2_5_vl", "ragged", 0.1).sum(1)
    assert compression.inputs["attention_mask"].sum(1).tolist() == kept.tolist()
    for layer in found.past_key_values.layers:
        for x in (layer.keys, layer.values):
            assert x.shape == (3, 2, int(kept.max()), 8)
            assert x.untyped_storage().nbytes() == x.numel() * 4


@pytest.mark.parametrize("family", SOME)
def test_rows_beams_and_samples(family):
    """Rows answer as alone, beams and samples as those of their rows."""
    model, whole = hf.tiny(family), hf.batch(family, hf.RAGGED)
    length = whole.inputs["input_ids"].shape[1]
    beams = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with compress(model, keep_ratio=0.5, stage="kv"):
        together = model.generate(**whole.inputs, **beams)[:, length:].unflatten(0, (3, 2))
        for row in range(3):
            alone = row_of((family, hf.RAGGED), row).inputs
            answer = model.generate(**alone, **beams)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(together[row], answer)
        torch.manual_seed(5)
        sampled = model.generate(**whole.inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2, **TELL)
    assert not torch.equal(together[:, 0], together[:, 1])
    keep = kept_by_attention(family, "ragged", 0.5)
    for copy_ in range(2):
        wanted = masked_run(family, "ragged", keep, sampled.sequences[copy_::2, -6:])
        torch.testing.assert_close(torch.stack(sampled.logits, 1)[copy_::2], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SOME)
def test_a_second_question(family):
    model, found = hf.tiny(family), answered(family, "ragged")
    (first, compression), keep = found, kept_by_attention(family, "ragged", 0.5)
    answer = first.sequences[:, -STEPS:]
    question = torch.randint(10, 140, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, STEPS + 5, dtype=torch.int64)
    question[1, :2], mask[1, STEPS : STEPS + 2] = hf.PAD, 0
    said = torch.cat([answer, question], 1)
    turn = next_turn(compression.inputs, first.past_key_values, said, mask)
    second = model.generate(**turn, max_new_tokens=4, do_sample=False, **TELL)
    visible = torch.cat([mask, torch.ones(3, 3, dtype=torch.int64)], 1)
    wanted = masked_run(family, "ragged", keep, torch.cat([said, second.sequences[:, -4:]], 1), visible)
    torch.testing.assert_close(torch.stack(second.logits, 1), wanted[:, -4:], atol=1e-5, rtol=0)


def test_padding_shared_by_all_rows():
    """Columns that are padding in every row are not read, nor counted."""
    model, batch, _ = case("llava_onevision", "ragged")
    wider = dict(batch.inputs)
    for name in ("input_ids", "attention_mask"):
        wider[name] = torch.nn.functional.pad(wider[name], (3, 0))
    with compress(model, keep_ratio=0.5, stage="kv"):
        wide, plain = (model.generate(**inputs, **GREEDY) for inputs in (wider, batch.inputs))
    assert torch.equal(wide[:, 3:], plain)


def test_budgets_and_compressors():
    model, batch = hf.tiny("llava_onevision"), hf.batch("llava_onevision")
    for selector, options in [(None, {"budget": "frames", "fill": "none"}), (divprune, {}), (None, {})]:
        with compress(model, selector, num_tokens=6, stage="kv", **options) as compression:
            model.generate(**batch.inputs, max_new_tokens=2)
        assert compression.kept == (6,)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_no_trace_is_left(family):
    model, batch = copy.deepcopy(hf.tiny(family)), hf.batch(family)
    before = state_of(model)

    def fails(ids, logits):
        raise KeyError("step")

    with compress(model, keep_ratio=0.5, stage="kv"):
        model.generate(**batch.inputs, max_new_tokens=2)
        with pytest.raises(KeyError, match="step"):
            model.generate(**batch.inputs, max_new_tokens=2, logits_processor=[fails])
        within = {key: value for key, value in state_of(model).items() if before.get(key) != value}
        assert all(name == "generate" or "hooks" in name for _, name in within)
    assert state_of(model) == before


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(message, options=(), call=(), error=ValueError, family="llava_onevision"):
    model, batch = hf.tiny(family), hf.batch(family)
    with (
        pytest.raises(error, match=message) as caught,
        compress(model, **{"keep_ratio": 0.5, "stage": "kv", **dict(options)}),
    ):
        model.generate(**batch.inputs, max_new_tokens=2, **dict(call))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_served_is_named():
    model = hf.tiny("llava_onevision")
    refused("stage='cache' must be one of", {"stage": "cache"})
    refused("stage='prefill' needs a selector", {"stage": "prefill"})
    refused("selector is a str, it must be", {"selector": "attention"}, error=TypeError)
    refused("takes no fills", {"fills": "none"})
    refused(r"num_tokens=17 must be in \[1, 16\]", {"keep_ratio": None, "num_tokens": 17})
    refused("generate runs with no cache", call={"use_cache": False}, family="qwen3_vl")
    refused("runs with cache_implementation='static'", call={"cache_implementation": "static"})
    refused("prompt_lookup_num_tokens is set", call={"prompt_lookup_num_tokens": 2})
    cache = transformers.DynamicCache()
    model(input_ids=torch.ones(1, 5, dtype=torch.int64), past_key_values=cache)
    for stage in ({}, {"stage": "prefill", "selector": scores}):
        refused("past_key_values hold 5 tokens of another prompt", stage, {"past_key_values": cache})
    found, compression = answered("llava_onevision", "single")
    other, _ = answered("llava_onevision", "single", keep_ratio=0.1)
    with pytest.raises(ValueError, match=r"next_turn: the cache holds 32 tokens, it must hold the 17"):
        next_turn(compression.inputs, found.past_key_values, torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"next_turn: the cache holds 25 tokens, .* Pass the cache of this prompt"):
        next_turn(compression.inputs, other.past_key_values, torch.ones(1, 3, dtype=torch.int64))
