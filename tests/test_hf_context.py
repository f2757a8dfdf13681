"""`compress` around what users do with `generate`: wrappers, threads, settings, what looks at ids; what it refuses."""

from __future__ import annotations

import copy
import threading

import hf_models as hf
import pytest
import torch
import transformers
from test_hf_generate import state_of
from test_hf_oracle import scores

from cacovid_kernels.integrations.transformers import compress, next_turn, prune_inputs

GREEDY = {"max_new_tokens": 8, "do_sample": False}
STAGES = [("prefill", scores), ("kv", scores), ("kv", None)]


def fresh(family="llava_onevision"):
    """A model of this test alone, and its prompt."""
    return copy.deepcopy(hf.tiny(family)), hf.batch(family).inputs


def answer(model, prompt, stage="prefill", selector=scores, **options):
    with compress(model, selector, keep_ratio=0.5, stage=stage):
        return model.generate(**prompt, **{**GREEDY, **options})


def refused(message, error=ValueError, **call):
    model, inputs = fresh()
    with pytest.raises(error, match=message) as caught:
        answer(model, inputs, **call)
    assert "\n" not in str(caught.value)
    assert "generate" not in vars(model)


class Wrapper(torch.nn.Module):
    """As PEFT wraps a model: configuration and generation are those of the model inside."""

    def __init__(self, model, says_so):
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        if says_so:
            self.get_base_model = lambda: model

    def generate(self, *args, **kwargs):
        return self.model.generate(*args, **kwargs)


@pytest.mark.parametrize(("stage", "selector"), STAGES)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_models_inside_something(family, stage, selector):
    model, inputs = fresh(family)
    tell = {"return_dict_in_generate": True, "output_logits": True}
    wanted = torch.stack(answer(model, inputs, stage, selector, **tell).logits)
    assert not torch.equal(wanted, torch.stack(model.generate(**inputs, **GREEDY, **tell).logits))
    for outer in (torch.compile(model), Wrapper(model, says_so=True)):
        assert torch.equal(torch.stack(answer(outer, inputs, stage, selector, **tell).logits), wanted)
        assert "generate" not in vars(outer)


def test_prune_inputs_of_models_inside_something():
    model, inputs = fresh("qwen2_5_vl")
    wanted = prune_inputs(model, inputs, scores, keep_ratio=0.5)
    for outer in (torch.compile(model), Wrapper(model, says_so=True)):
        found = prune_inputs(outer, inputs, scores, keep_ratio=0.5)
        assert all(torch.equal(found[name], x) for name, x in wanted.items())


@pytest.mark.parametrize(("stage", "selector"), STAGES)
def test_padding_is_told_by_the_call(stage, selector):
    """Without a mask, by a padding token that only the call names."""
    model = fresh()[0]
    model.generation_config.pad_token_id = None
    inputs = dict(hf.batch("llava_onevision", hf.RAGGED).inputs)
    wanted = answer(model, inputs, stage, selector, pad_token_id=hf.PAD)
    del inputs["attention_mask"]
    assert torch.equal(answer(model, inputs, stage, selector, pad_token_id=hf.PAD), wanted)


def test_a_model_that_hides_another_is_noticed():
    model, inputs = fresh("llava_onevision")
    outer = Wrapper(model, says_so=False)
    outer.base_model, outer.get_input_embeddings = model.base_model, model.get_input_embeddings
    outer.get_decoder = model.get_decoder
    with pytest.raises(RuntimeError, match="saw no call of Wrapper, so nothing was dropped") as caught:
        answer(outer, inputs, "kv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stage", "selector"), STAGES)
def test_threads_on_one_model(stage, selector):
    model, first = fresh()
    rows = [[("text", 6), ("video", 4), ("text", 9)]]
    prompts = [first, hf.batch("llava_onevision", rows, seed=2).inputs]
    with compress(model, selector, keep_ratio=0.5, stage=stage):
        wanted = [model.generate(**inputs, **GREEDY) for inputs in prompts]
        found = []

        def run(i):
            found.append((i, model.generate(**prompts[i], **GREEDY)))

        for _ in range(5):
            threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(found) == 10
    assert all(torch.equal(ids, wanted[i]) for i, ids in found)


def test_settings_of_the_model_count_where_the_call_is_silent():
    model, inputs = fresh()
    length = inputs["input_ids"].shape[1]
    model.generation_config.max_length = length + 4
    own = transformers.GenerationConfig(do_sample=False, pad_token_id=hf.PAD)
    with compress(model, scores, keep_ratio=0.5):
        ids = model.generate(**inputs, generation_config=own)
    assert ids.shape == model.generate(**inputs, generation_config=own).shape == (1, length + 4)
    model.generation_config.prompt_lookup_num_tokens = 3
    with compress(model, scores, keep_ratio=0.5), pytest.raises(ValueError, match="prompt_lookup_num_tokens is set"):
        model.generate(**inputs, generation_config=own)


class Watch(transformers.generation.streamers.BaseStreamer):
    """Whatever can look at ids, and what it saw."""

    def __init__(self):
        self.seen, self.pieces = [], []

    def __call__(self, ids, scores):
        self.seen.append(ids.clone())
        return scores

    def stop(self, ids, scores, **named):
        self(ids, scores)
        return torch.zeros(len(ids), dtype=torch.bool)

    def put(self, ids):
        self.pieces.append(ids.clone())

    def end(self):
        self.pieces.append(None)


@pytest.mark.parametrize(("stage", "selector"), STAGES)
def test_what_looks_at_ids_sees_whole_prompts(stage, selector):
    model, inputs = fresh()
    looks, stops, streams, allows = Watch(), Watch(), Watch(), []
    ids = answer(
        model,
        inputs,
        stage,
        selector,
        logits_processor=[looks],
        stopping_criteria=[stops.stop],
        prefix_allowed_tokens_fn=lambda row, ids: allows.append(ids.clone()) or list(range(10, 140)),
        streamer=streams,
    )
    length = inputs["input_ids"].shape[1]
    for step, (look, allow) in enumerate(zip(looks.seen, allows, strict=True)):
        assert torch.equal(look, ids[:, : length + step])
        assert torch.equal(allow, ids[0, : length + step])
    assert torch.equal(stops.seen[-1], ids)
    assert torch.equal(streams.pieces[0], inputs["input_ids"])
    assert [int(piece) for piece in streams.pieces[1:-1]] == ids[0, length:].tolist()
    assert streams.pieces[-1] is None


def test_what_transformers_knows_by_its_type_stays_what_it_is():
    """One's own setting replaces the default, rows that have ended are padded, what is given twice runs once."""
    generation, model = transformers.generation, fresh()[0]
    inputs = hf.batch("llava_onevision", hf.RAGGED).inputs
    length = inputs["input_ids"].shape[1]
    first = model.generate(**inputs, **GREEDY)[0, length + 1]
    counts = []
    twice = lambda ids, scores: counts.append(len(ids)) or scores  # noqa: E731
    options = {
        "repetition_penalty": 5.0,
        "logits_processor": [generation.RepetitionPenaltyLogitsProcessor(1.0001), twice, twice],
        "stopping_criteria": generation.StoppingCriteriaList(
            [generation.EosTokenCriteria(int(first)), generation.MaxLengthCriteria(length + 6)]
        ),
    }
    wanted = model.generate(**inputs, **GREEDY, **options)
    called = len(counts)
    with compress(model, scores, keep_ratio=1.0):
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), wanted)
    assert len(counts) == 2 * called
    with compress(model, scores, keep_ratio=0.5):
        assert model.generate(**inputs, **GREEDY, **options).shape[1] <= length + 6
    assert (wanted[0] == hf.PAD).sum() > (inputs["input_ids"][0] == hf.PAD).sum()


@pytest.mark.parametrize(("stage", "selector"), STAGES)
def test_none_in_the_call_overrules_the_settings_of_the_model(stage, selector):
    model, inputs = fresh()
    length = inputs["input_ids"].shape[1]
    model.generation_config.max_new_tokens, model.generation_config.cache_implementation = 30, "static"
    ids = answer(model, inputs, stage, selector, max_new_tokens=None, max_length=length + 5, cache_implementation=None)
    assert ids.shape[1] == length + 5


def test_a_dynamic_cache_by_name():
    model, inputs = fresh()
    wanted = answer(model, inputs, "kv")
    assert torch.equal(answer(model, inputs, "kv", cache_implementation="dynamic"), wanted)
    model.generation_config.cache_implementation = "dynamic"
    assert torch.equal(answer(model, inputs, "kv"), wanted)


def test_arguments_without_a_name():
    model, inputs = fresh()
    watch, ids = Watch(), inputs["input_ids"]
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    with compress(model, scores, keep_ratio=0.5):
        model.generate(ids, None, [watch], **others, **GREEDY)
    assert watch.seen[0].shape == ids.shape
    outer = Wrapper(model, says_so=True)
    with compress(outer, scores, keep_ratio=0.5), pytest.raises(ValueError, match="Name all but the first two"):
        outer.generate(ids, None, [watch], **others)


def test_a_streamer_of_several_samples():
    model, inputs = fresh()
    watch = Watch()
    answer(model, inputs, do_sample=True, num_return_sequences=2, streamer=watch)
    assert watch.pieces[0].shape == (2, inputs["input_ids"].shape[1])


def test_a_copy_made_inside_the_block():
    model = fresh()[0]
    with compress(model, scores, keep_ratio=0.5):
        other = copy.deepcopy(model)
    with (
        pytest.raises(ValueError, match=r"was copied in the block .* del model\.generate"),
        compress(other, scores, keep_ratio=0.5),
    ):
        pass


def test_criteria_of_beams_see_the_prompts_of_their_rows():
    model = fresh()[0]
    inputs, watch = hf.batch("llava_onevision", hf.RAGGED).inputs, Watch()
    answer(model, inputs, num_beams=2, stopping_criteria=[watch.stop])
    for ids in watch.seen:
        prompts = inputs["input_ids"].repeat_interleave(len(ids) // 3, 0)
        assert torch.equal(ids[:, : prompts.shape[1]], prompts)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_images_alone_stay_whole(family):
    model = hf.tiny(family)
    inputs = hf.batch(family, [[("text", 3), ("image",), ("text", 5)]]).inputs
    without = {name: value for name, value in inputs.items() if name != "visuals"}
    plain = model.generate(**without, **GREEDY)
    for given in (inputs, without):
        with compress(model, scores, keep_ratio=0.25) as compression:
            assert torch.equal(model.generate(**given, **GREEDY), plain)
        assert compression.kept == ()
        assert prune_inputs(model, given, scores, keep_ratio=0.25)["attention_mask"].shape == without["input_ids"].shape


def test_one_block_at_a_time():
    model, inputs = fresh()
    model.generate(**inputs, **GREEDY)
    before = state_of(model)
    with compress(model, scores, keep_ratio=0.5) as outer:
        with (
            pytest.raises(ValueError, match=r"in the block of another compress\. Leave that one first"),
            compress(model, scores, keep_ratio=0.1),
        ):
            pass
        model.generate(**inputs, **GREEDY)
    assert outer.kept == (8,)
    assert state_of(model) == before


def test_what_is_refused():
    inputs = hf.batch("llava_onevision").inputs
    length = inputs["input_ids"].shape[1]
    for stage in ("prefill", "kv"):
        refused("position_ids is given, but it is made here", stage=stage, position_ids=torch.arange(length)[None])
        refused("inputs_embeds is given", stage=stage, inputs_embeds=torch.zeros(1, length, 32))
        refused("labels is given", stage=stage, labels=inputs["input_ids"])
        refused("the prompt is given twice", stage=stage, inputs=inputs["input_ids"])
        refused("encoder_repetition_penalty is set, but it reads the ids", stage=stage, encoder_repetition_penalty=1.3)
        refused("encoder_no_repeat_ngram_size is set", stage=stage, encoder_no_repeat_ngram_size=2)
        neutral = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
        answer(*fresh(), stage, **neutral)


def test_layers_that_count_tokens_are_refused():
    model, inputs = fresh()
    model.config.get_text_config().layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layers of \['sliding_attention'\], which count tokens") as caught:
        prune_inputs(model, inputs, scores, keep_ratio=0.5)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="sliding_attention"), compress(model, scores, keep_ratio=0.5):
        pass
    text = model.config.get_text_config()
    text.layer_types, text.sliding_window = None, 8  # as Mistral says it
    with pytest.raises(ValueError, match="sliding_window"), compress(model, scores, keep_ratio=0.5, stage="kv"):
        pass


def test_a_cache_that_gradient_checkpointing_left_empty():
    model, inputs = fresh()
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"empty cache behind the prompt, .* Call model.eval\(\)"):
        answer(model, inputs, "kv")


def test_another_turn_on_no_cache_or_one_of_other_rows():
    model, inputs = fresh()
    out = prune_inputs(model, inputs, scores, keep_ratio=0.5)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"next_turn: the cache is None\. Generate once"):
        next_turn(out, None, ids)
    with pytest.raises(ValueError, match="next_turn: previous is None"):
        next_turn(None, transformers.DynamicCache(), ids)
    beams = model.generate(**out, max_new_tokens=2, num_beams=3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="the cache holds 3 rows, the prompt 1"):
        next_turn(out, beams.past_key_values, ids)
