"""Dropping tokens is the run at full length in which nobody sees them: logits and generated tokens of all families."""

from __future__ import annotations

from functools import lru_cache

import hf_models as hf
import pytest
import torch

from cacovid_kernels.integrations.transformers import compress, prune_inputs

STEPS = 16
RATIOS = (1.0, 0.5, 0.1)
BATCHES = {"single": hf.SINGLE, "ragged": hf.RAGGED, "mixed": hf.MIXED}


def scores(embeds, grid):
    return embeds @ torch.linspace(-1, 1, embeds.shape[-1])


@lru_cache
def case(family, name):
    """Model, prompts, positions at full length."""
    model, batch = hf.tiny(family), hf.batch(family, BATCHES[name])
    mask = batch.inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if family in hf.MROPE_FAMILIES:
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask")
        grids = {key: batch.inputs[key] for key in names if key in batch.inputs}
        positions = model.model.get_rope_index(batch.inputs["input_ids"], **grids)[0]
    return model, batch, positions


def kept_tokens(family, name, ratio):
    """`[B, L]` bool: what must be left, worked out from the layout of the prompt alone."""
    model, batch, _ = case(family, name)
    seen = []
    prune_inputs(model, batch.inputs, lambda x, grid: seen.append(x) or scores(x, grid), keep_ratio=ratio)
    keep = batch.inputs["attention_mask"].bool()
    every = torch.full(keep.shape, -torch.inf)
    every[batch.video >= 0] = torch.cat([scores(x, None) for x in seen])  # row by row, in the order of the tokens
    for video in range(int(batch.video.max()) + 1):
        places = (batch.video == video).flatten().nonzero()[:, 0]
        best = every.flatten()[places].topk(max(1, int(ratio * len(places)))).indices
        keep.view(-1)[places] = False
        keep.view(-1)[places[best]] = True
    return keep


def full_run(model, inputs, mask, positions, answer):
    """Logits of the prompt and of every step of `answer`, all at full length under `mask`."""
    inputs = {key: value for key, value in inputs.items() if key not in ("visuals", "attention_mask")}
    prompt = model(**inputs, attention_mask=mask.long(), position_ids=positions, use_cache=True)
    steps = answer[:, :-1]
    everything = torch.cat([mask.long(), torch.ones_like(steps)], 1)
    following = positions[..., -1:] + torch.arange(1, steps.shape[1] + 1)
    rest = model(
        input_ids=steps, attention_mask=everything, position_ids=following, past_key_values=prompt.past_key_values
    )
    return prompt.logits, torch.cat([prompt.logits[:, -1:], rest.logits], 1)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", [*hf.FAMILIES, "qwen3_vl_moe"])
def test_as_the_masked_run_at_full_length(family, name, ratio):
    model, batch, positions = case(family, name)
    keep = kept_tokens(family, name, ratio)
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=ratio)
    length = int(keep.sum(1).max())
    assert out["attention_mask"].shape == (len(keep), length)
    assert torch.equal(out["attention_mask"].sum(1), keep.sum(1))

    logits = model(**out).logits
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**out, **options)
    answer = found.sequences[:, -STEPS:]
    wanted, decoded = full_run(model, batch.inputs, keep, positions, answer)
    for row, places in enumerate(keep):
        short = logits[row, length - int(places.sum()) :]
        torch.testing.assert_close(short, wanted[row, places], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(found.logits, 1), decoded, atol=1e-5, rtol=0)
    assert torch.equal(answer, decoded.argmax(-1))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_masked_run_depends_on_what_is_masked(family):
    """The comparison above can fail: seeing every token, or other positions, gives other logits."""
    model, batch, positions = case(family, "single")
    keep = kept_tokens(family, "single", 0.5)
    answer = torch.full((1, 2), 7)
    wanted, _ = full_run(model, batch.inputs, keep, positions, answer)
    everything, _ = full_run(model, batch.inputs, torch.ones_like(keep), positions, answer)
    assert (wanted - everything)[0, -1].abs().max() > 1e-3
    out = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    renumbered = torch.arange(out["position_ids"].shape[-1]).expand(out["position_ids"].shape)
    moved = model(**{**out, "position_ids": renumbered}).logits
    assert (moved[0, -1] - wanted[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", hf.FAMILIES)
def test_keeping_all_is_the_untouched_model_bit_for_bit(family, name):
    model, batch, _ = case(family, name)
    plain = {key: value for key, value in batch.inputs.items() if key != "visuals"}
    if name != "ragged":  # a call of the model counts positions from the padding on, generation from the text on
        out = prune_inputs(model, batch.inputs, scores, keep_ratio=1.0)
        assert torch.equal(model(**out).logits, model(**plain).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**plain, **options)
    with compress(model, scores, keep_ratio=1.0):
        found = model.generate(**batch.inputs, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
