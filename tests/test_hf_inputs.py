"""Selectors, counts, structural tokens, training and bad input of `prune_inputs`."""

from __future__ import annotations

import copy
import functools

import hf_models as hf
import pytest
import torch
from test_hf_oracle import scores

import cacovid_kernels as ck
from cacovid_kernels import compressors
from cacovid_kernels.integrations import transformers as integration
from cacovid_kernels.integrations.transformers import Adapter, Visual, compress, prune_inputs, register_adapter
from cacovid_kernels.integrations.transformers.registry import _adapters, adapter_of


def lengths(family, rows=hf.SINGLE, selector=scores, **options):
    return prune_inputs(hf.tiny(family), hf.batch(family, rows).inputs, selector, **options)["attention_mask"].sum(1)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_structural_tokens_stay_whatever_the_scores(family):
    """One token per video is left: everything else that is missing was a video token."""
    for rows in (hf.SINGLE, hf.RAGGED, hf.MIXED):
        batch = hf.batch(family, rows)
        out = prune_inputs(hf.tiny(family), batch.inputs, lambda x, grid: torch.full((len(x),), -9.0), num_tokens=1)
        videos = torch.tensor([sum(item[0] == "video" for item in items) for items in rows])
        structure = (batch.inputs["attention_mask"].bool() & (batch.video < 0)).sum(1)
        assert torch.equal(out["attention_mask"].sum(1), structure + videos)


def test_a_function_sees_the_videos_of_one_prompt_with_their_grids():
    seen = []
    lengths("qwen2_5_vl", hf.RAGGED, lambda x, grid: seen.append((x, grid)) or scores(x, grid), keep_ratio=0.5)
    assert [grid for _, grid in seen] == [[(3, 2, 2)], [(3, 2, 4), (3, 2, 2)], [(3, 2, 4)]]
    assert [len(x) for x, _ in seen] == [12, 36, 24]
    assert not any(x.requires_grad for x, _ in seen)


def test_counts_per_video():
    assert lengths("qwen2_5_vl", hf.RAGGED, num_tokens=2).tolist() == [9, 20, 17]
    assert lengths("qwen2_5_vl", hf.RAGGED, num_tokens=[1, 2, 3, 4]).tolist() == [8, 21, 19]


def policy_of(family):
    torch.manual_seed(7)
    return ck.CompressionPolicy.from_language_model(hf.tiny(family).model.language_model).eval()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_a_policy_selects_as_by_hand(family):
    policy, batch, model = policy_of(family), hf.batch(family, hf.RAGGED), hf.tiny(family)
    full = prune_inputs(model, batch.inputs, scores, keep_ratio=1.0)
    mask = batch.inputs["attention_mask"]
    embeds = full.get("inputs_embeds")
    if embeds is None:  # ids and features apart
        embeds = model.get_input_embeddings()(full["input_ids"])
        video = torch.cat(list(full["mm_encoder_outputs"]["video"].pooler_output))
        embeds[full["input_ids"] == hf.VIDEO] = video
    seen = []
    lengths(family, hf.RAGGED, lambda x, grid: seen.extend(grid) or scores(x, grid), keep_ratio=0.5)
    marked = (batch.video >= 0)[:, -embeds.shape[1] :]
    with torch.no_grad():
        found = policy(embeds, video_mask=marked, attention_mask=mask[:, -embeds.shape[1] :], grid_thw=seen)
    kept = ck.select_tokens(found.tokens, found.frames, seen, keep_ratio=0.3, importance_ratio=0.8)
    stays = mask.bool().clone()
    stays[batch.video >= 0] = kept.mask()
    out = prune_inputs(model, batch.inputs, policy, keep_ratio=0.3, importance_ratio=0.8)
    labels = torch.arange(stays.numel()).view(stays.shape)
    out_labels = prune_inputs(model, batch.inputs, policy, keep_ratio=0.3, importance_ratio=0.8, labels=labels)[
        "labels"
    ]
    assert torch.equal(out["attention_mask"].sum(1), stays.sum(1))
    assert torch.equal(out_labels[out_labels >= 0], labels[stays])
    over_video = prune_inputs(model, batch.inputs, policy, keep_ratio=0.3, budget="video", labels=labels)["labels"]
    stays[batch.video >= 0] = ck.topk_tokens(found.tokens, seen, keep_ratio=0.3).mask()
    assert torch.equal(over_video[over_video >= 0], labels[stays])


def test_a_policy_gets_a_mask_only_where_there_is_padding():
    policy = policy_of("llava_onevision")
    masks = []
    policy.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    for rows in (hf.SINGLE, hf.RAGGED):
        lengths("llava_onevision", rows, policy, keep_ratio=0.5)
    assert masks[0] is None
    assert torch.equal(masks[1], hf.batch("llava_onevision", hf.RAGGED).inputs["attention_mask"])


@pytest.mark.parametrize("name", ["divprune", "evs", "vidcom2"])
def test_compressors_choose_per_video(name):
    function, batch, model = getattr(compressors, name), hf.batch("qwen2_5_vl", hf.RAGGED), hf.tiny("qwen2_5_vl")
    seen = []
    prune_inputs(model, batch.inputs, lambda x, grid: seen.append((x, grid)) or scores(x, grid), keep_ratio=0.5)
    videos = [
        part.view(t, h * w, -1)
        for x, grid in seen
        for part, (t, h, w) in zip(x.split([t * h * w for t, h, w in grid]), grid, strict=True)
    ]
    labels = torch.arange(batch.video.numel()).view(batch.video.shape)
    stays = batch.inputs["attention_mask"].bool().clone()
    keep = torch.cat([torch.zeros(v.shape[0] * v.shape[1]).scatter(0, function(v, 5), 1).bool() for v in videos])
    stays[batch.video >= 0] = keep
    for selector in (function, functools.partial(function)):
        found = prune_inputs(model, batch.inputs, selector, num_tokens=5, labels=labels)["labels"]
        assert torch.equal(found[found >= 0], labels[stays])


def test_video_llama_3_after_its_own_pruning():
    """Its processor may have dropped tokens: what is left of a video is one row, and the rest works as ever."""
    batch, model = hf.batch("video_llama_3"), hf.tiny("video_llama_3")
    changed = torch.ones(16, dtype=torch.bool)
    changed[[5, 6, 7, 13]] = False
    stays = torch.ones(batch.video.shape, dtype=torch.bool)
    stays[batch.video >= 0] = changed
    inputs = {**batch.inputs, "video_compression_mask": changed}
    inputs |= {name: inputs[name][stays][None] for name in ("input_ids", "attention_mask")}
    everything = prune_inputs(model, inputs, scores, keep_ratio=1.0)
    assert torch.equal(model(**everything).logits, model(**inputs).logits)
    grids = []
    half = prune_inputs(model, inputs, lambda x, grid: grids.extend(grid) or scores(x, grid), keep_ratio=0.5)
    assert grids == [(1, 1, 12)]
    assert half["attention_mask"].sum() == everything["attention_mask"].sum() - 6
    refused(r"evs compares frames, and the video \(1, 1, 12\) has one", model, inputs, compressors.evs)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_gradients_and_labels_go_through_the_compaction(family):
    """Gradients of the loss by the vision tower: those of the masked run at full length."""
    model, batch = copy.deepcopy(hf.tiny(family)).requires_grad_(True), hf.batch(family, hf.RAGGED)
    labels = torch.where(batch.video < 0, batch.inputs["input_ids"], -100)
    labels = labels.masked_fill(batch.inputs["attention_mask"] == 0, -100)
    labels[:, :-2] = -100  # an answer that does not touch the video
    out = prune_inputs(model, {**batch.inputs, "labels": labels}, scores, keep_ratio=0.5)
    assert out["labels"].shape == out["attention_mask"].shape
    assert torch.equal(out["labels"][:, -2:], labels[:, -2:])
    assert (out["labels"][:, :-2] == -100).all()
    model(**out).loss.backward()
    short = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    places = torch.arange(labels.numel()).view(labels.shape)
    kept = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5, labels=places)["labels"]
    keep = torch.zeros(labels.numel(), dtype=torch.bool).scatter(0, kept[kept >= 0], True).view(labels.shape)
    positions = adapter_of(model).positions(
        model, batch.inputs, batch.inputs["input_ids"], batch.inputs["attention_mask"]
    )
    inputs = {name: value for name, value in batch.inputs.items() if name not in ("visuals", "attention_mask")}
    model(**inputs, attention_mask=keep.long(), position_ids=positions, labels=labels).loss.backward()
    towers = 0
    for name, parameter in model.named_parameters():
        if name in short:
            scale = parameter.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(short[name], parameter.grad, atol=1e-5 * scale.item(), rtol=0)
            towers += "language_model" not in name and "text_model" not in name and bool(short[name].abs().max() > 0)
    assert towers > 5


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(message, model, inputs, selector=scores, error=ValueError, **options):
    with pytest.raises(error, match=message) as caught:
        prune_inputs(model, inputs, selector, **({"keep_ratio": 0.5} | options))
    assert "\n" not in str(caught.value)


def test_unknown_models():
    class Unknown:
        class config:  # noqa: N801
            model_type = "mystery_vl"

    refused(
        r"no adapter for Unknown \(model_type='mystery_vl'\); known are \['internvl', .*\]\. Subclass", Unknown(), {}
    )
    inner = hf.tiny("qwen2_vl").model
    refused("Qwen2VLModel cannot generate. Pass the ...ForConditionalGeneration", inner, {})
    with pytest.raises(ValueError, match="no adapter for Unknown"), compress(Unknown(), scores, keep_ratio=0.5):
        pass


def test_an_adapter_can_be_added():
    class Twin(Adapter):
        family = "Twin"
        model_types = ("twin",)

        def visuals(self, model, inputs, num_features):
            return [Visual.video((4, 2, 2))]

    model, batch = copy.deepcopy(hf.tiny("llava_next_video")), hf.batch("llava_next_video")
    wanted = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    model.config.model_type = "twin"
    register_adapter(Twin())
    try:
        found = prune_inputs(model, batch.inputs, scores, keep_ratio=0.5)
    finally:
        del _adapters["twin"]
    assert torch.equal(found["inputs_embeds"], wanted["inputs_embeds"])


def test_prompts_that_do_not_fit_their_videos():
    model, batch = hf.tiny("qwen2_5_vl"), hf.batch("qwen2_5_vl", hf.RAGGED)
    short = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    short["input_ids"][0, (batch.video[0] == 0).nonzero()[0]] = 9
    refused(r"the prompts have 71 video placeholders, the grids \[\(3, 2, 2\), .* need 72\. Pass ids,", model, short)
    flat, one = hf.tiny("llava_onevision"), hf.batch("llava_onevision", hf.RAGGED)
    short = {**one.inputs, "input_ids": one.inputs["input_ids"].clone()}
    short["input_ids"][0, (one.video[0] == 0).nonzero()[0]] = 9
    refused("the prompts have 67 video placeholders, the vision tower gives 68 features. Pass ids and", flat, short)
    short["input_ids"][2, -2] = hf.VIDEO
    refused(r"visual 0 with 17 placeholders would lie in the rows \[0, 1\]", flat, short)
    swapped = {**batch.inputs, "input_ids": batch.inputs["input_ids"].roll(1, 0)}
    swapped["attention_mask"] = batch.inputs["attention_mask"].roll(1, 0)
    refused(r"run 0 of video placeholders has 24, video 0 of the grid \(3, 2, 2\) needs 12 there", model, swapped)
    tiles = hf.batch("internvl", hf.MIXED).inputs
    refused(
        r"need 32\. Pass ids|the prompts have 40 placeholders",
        hf.tiny("internvl"),
        {**tiles, "visuals": [("video", 8)]},
    )
    refused(r"visuals has the entry \('clip', 4\)", hf.tiny("internvl"), {**tiles, "visuals": [("clip", 4)]})
    refused("visuals has the entry 'video'", hf.tiny("internvl"), {**tiles, "visuals": "video"})
    refused("visuals has the entry 3", hf.tiny("internvl"), {**tiles, "visuals": [3]})
    big = hf.batch("internvl").inputs
    row = big["input_ids"][0].tolist()
    first = row.index(hf.IMAGE)
    merged = row[: first + 4] + [hf.IMAGE] * 4 + [i for i in row[first + 4 :] if i != hf.IMAGE] + [hf.IMAGE] * 8 + [5]
    big |= {"input_ids": torch.tensor([merged]), "attention_mask": torch.ones(1, len(merged)).long()}
    refused(r'row 0 holds an image of several tiles .* Pass inputs\["visuals"\]', hf.tiny("internvl"), big)


def test_prompts_that_cannot_be_read():
    model, batch = hf.tiny("llava_onevision"), hf.batch("llava_onevision")
    inputs = batch.inputs
    refused("inputs hold no pixel_values_videos, only", model, {"input_ids": inputs["input_ids"]})
    refused(
        r"inputs hold no input_ids, only \['pixel_values_videos'\]",
        model,
        {**inputs, "input_ids": None, "attention_mask": None},
    )
    refused("inputs hold no input_ids", model, {"pixel_values_videos": inputs["pixel_values_videos"]})
    refused("inputs hold past_key_values, .* use next_turn", model, {**inputs, "past_key_values": object()})
    refused(r"attention_mask \[1, 3\] must be \[1, 25\]", model, {**inputs, "attention_mask": torch.ones(1, 3)})
    right = inputs["attention_mask"].clone()
    right[0, -2:] = 0
    refused(
        "row 0 is padded on the right or inside, by attention_mask. Pad on the left",
        model,
        {**inputs, "attention_mask": right},
    )
    refused("inputs hold extra", model, {**inputs, "extra": torch.ones_like(right)})
    refused("labels .* must have the shape of input_ids", model, inputs, labels=torch.ones(1, 3))
    ends = hf.batch("qwen2_5_vl", [[("text", 2), ("video", 4)]]).inputs
    ends = {**ends, **{name: ends[name][:, :-1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}}
    refused("a prompt ends inside its video", hf.tiny("qwen2_5_vl"), ends)


def test_counts_that_cannot_be_kept():
    model, inputs = hf.tiny("llava_onevision"), hf.batch("llava_onevision").inputs
    refused(r"keep_ratio=0.0 must be in \(0, 1\]", model, inputs, keep_ratio=0.0)
    refused(r"keep_ratio=1.5 must be in \(0, 1\]", model, inputs, keep_ratio=1.5)
    refused("pass exactly one of keep_ratio and num_tokens", model, inputs, num_tokens=3)
    refused("pass exactly one of keep_ratio and num_tokens", model, inputs, keep_ratio=None)
    refused(r"num_tokens=17 must be in \[1, 16\]", model, inputs, keep_ratio=None, num_tokens=17)
    refused(r"num_tokens=0 must be in \[1, 16\]", model, inputs, keep_ratio=None, num_tokens=0)
    refused("num_tokens has 2 entries for 1 videos", model, inputs, keep_ratio=None, num_tokens=[1, 2])
    with pytest.raises(ValueError, match=r"keep_ratio=0\.0"), compress(model, scores, keep_ratio=0.0):
        pass


def test_selectors_that_cannot_choose():
    model, inputs = hf.tiny("llava_onevision"), hf.batch("llava_onevision").inputs
    refused("selector is a str, it must be", model, inputs, "attention", error=TypeError)
    refused("fastv needs keys of the language model", model, inputs, compressors.fastv)
    refused("density_peaks needs a number of tokens per frame", model, inputs, compressors.density_peaks)
    refused(r"selector gave \[3\] for row 0, .* each of its 16", model, inputs, lambda x, grid: x[:3, 0])
    refused("selector gave list for row 0", model, inputs, lambda x, grid: [1])
    refused(r"takes no importance_ratio; its options are \[\]", model, inputs, compressors.evs, importance_ratio=1.0)
    refused(r"takes no budget; its options are \[\]", model, inputs, compressors.evs, budget="video")
    refused(r"takes no order; its options are \['check'\]", model, inputs, order="score")
    refused(r"takes no fills; .* 'fill'", model, inputs, budget="frames", fills="none")
    refused("budget='token' must be one of", model, inputs, budget="token")
    narrow = ck.CompressionPolicy(ck.PolicyConfig(16, 32, 4, 2)).eval()
    refused("the policy has hidden_size=16, the model 32", model, inputs, narrow)


def test_a_version_without_an_entry_point_is_named(monkeypatch):
    model = hf.tiny("qwen3_vl")

    def forward(self, input_ids=None, **kwargs): ...

    monkeypatch.setattr(type(model), "forward", forward)
    refused(r"takes no mm_encoder_outputs, .* Use transformers >= 5\.18", model, {}, error=RuntimeError)
    old = hf.tiny("video_llava")
    monkeypatch.delattr(type(old.model), "get_video_features")
    refused(r"has no get_video_features\. Use transformers >= 5\.10", old, {}, error=RuntimeError)


def test_public_names():
    assert all(hasattr(integration, name) for name in integration.__all__)
