"""Inputs that do not belong together, that are no tensors, or that hide what they show: one line, before the model."""

from __future__ import annotations

import copy

import hf_models as hf
import pytest
import torch
import transformers
from test_hf_inputs import policy_of, refused
from test_hf_oracle import scores

from cacovid_kernels.integrations.transformers import compress, prune_inputs
from cacovid_kernels.integrations.transformers.registry import adapter_of

GRIDDED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")
FRAMES_APART = ("qwen3_vl", "video_llama_3")


def changed(family, rows=hf.SINGLE, **changes):
    """The inputs of a batch, some of them put through a function or left out."""
    inputs = hf.batch(family, rows).inputs
    for name, change in changes.items():
        if change is None:
            del inputs[name]
        else:
            inputs[name] = change(inputs[name])
    return inputs


def grown(t=0, h=0, w=0):
    return lambda grid: grid + torch.tensor([[t, h, w]])


@pytest.fixture
def no_tower(monkeypatch):
    """Nothing may reach a vision tower."""

    def encode(*_):
        raise AssertionError("the vision tower ran")

    for family in GRIDDED:
        monkeypatch.setattr(type(adapter_of(hf.tiny(family))), "encode", encode)


@pytest.mark.parametrize("family", GRIDDED)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_grid_thw": grown(t=1)}, r"pixel_values_videos has \d+ patches, video_grid_thw \[\[\d, 4, 4\]\] needs"),
        ({"video_grid_thw": grown(t=-1)}, r"pixel_values_videos has \d+ patches, video_grid_thw .* Pass ids, pixels"),
        ({"pixel_values_videos": lambda x: x[:-1]}, r"pixel_values_videos has (47|63) patches, .* needs (48|64)"),
        ({"video_grid_thw": grown(h=1)}, r"entry \(\d, 5, 4\), .* positive multiples of the merge size 2"),
        ({"video_grid_thw": grown(t=-9)}, r"entry \(-\d, 4, 4\), .* Pass the processor's grids"),
        ({"video_grid_thw": lambda x: x[0]}, r"video_grid_thw \[3\] must be \[videos, 3\]"),
        ({"video_grid_thw": lambda x: x[:, :2]}, r"video_grid_thw \[1, 2\] must be \[videos, 3\]"),
        ({"video_grid_thw": None}, r"inputs hold no video_grid_thw\. Pass the processor's whole output"),
        (
            {"input_ids": lambda x: torch.where(x == hf.VIDEO, 9, x)},
            r"the prompts have 0 video placeholders, the grids \[\(\d, 2, 2\)\] need (12|16)",
        ),
        (
            {"input_ids": lambda x: torch.cat([x[:, :1] * 0 + hf.IMAGE, x[:, 1:]], 1)},
            r"the prompts have 1 image placeholders, but inputs hold no pixel_values",
        ),
    ],
)
def test_grids_that_do_not_fit_are_refused_before_the_vision_tower(family, changes, message, no_tower):
    refused(message, hf.tiny(family), changed(family, **changes))
    with pytest.raises(ValueError, match=message), compress(hf.tiny(family), scores, keep_ratio=0.5):
        hf.tiny(family).generate(**changed(family, **changes), max_new_tokens=1)


@pytest.mark.parametrize("family", GRIDDED)
def test_grids_of_images_and_of_another_video(family, no_tower):
    model = hf.tiny(family)
    refused(
        r"pixel_values has 32 patches, image_grid_thw .* needs 64",
        model,
        changed(family, hf.MIXED, image_grid_thw=lambda x: x * torch.tensor([[2, 1, 1]])),
    )
    refused("inputs hold no image_grid_thw", model, changed(family, hf.MIXED, image_grid_thw=None))
    refused(
        "video_grid_thw is a list, it must be a tensor", model, changed(family, video_grid_thw=list), error=TypeError
    )
    if family != "video_llama_3":  # whose videos are alike here
        swap = changed(family, hf.MIXED, video_grid_thw=lambda x: x.flip(0))
        refused(r"run 0 of video placeholders has (12|4), video 0 of the grid \(3, 2, 4\) needs (24|8)", model, swap)
        short = changed(family, mm_token_type_ids=lambda x: x[:, :-1])
        refused(r"mm_token_type_ids \[1, (21|31)\] must be \[1, (22|32)\]", model, short)


@pytest.mark.parametrize("family", FRAMES_APART)
def test_frames_that_are_told_apart_have_placeholders_of_their_own(family, no_tower):
    """As many placeholders as the grid needs, but of twice the frames, each half as high."""
    halved = changed(family, video_grid_thw=lambda x: x * torch.tensor([[2, 1, 1]]) // torch.tensor([[1, 2, 1]]))
    refused(r"the prompts have (3|4) runs of video placeholders, the grids .* need (6|8)", hf.tiny(family), halved)
    moved = changed(family)
    first = (moved["input_ids"][0] == hf.VIDEO).nonzero()[0]
    moved["input_ids"][0, first] = 9
    moved["input_ids"][0, -1] = hf.VIDEO
    refused(r"the prompts have (4|5) runs of video placeholders", hf.tiny(family), moved)
    moved["input_ids"][0, -1] = 9
    moved["input_ids"][0, (moved["input_ids"][0] == hf.VIDEO).nonzero()[-1] + 1] = hf.VIDEO
    refused(r"run 0 of video placeholders has 3, video 0 of the grid .* needs 4 there", hf.tiny(family), moved)


def test_merge_sizes_and_masks_of_video_llama_3(no_tower):
    model = hf.tiny("video_llama_3")
    for change, message in (
        (None, "inputs hold no video_merge_sizes"),
        (lambda x: x.repeat(2), r"video_merge_sizes \[2\] must be \[1\]"),
        (lambda x: x // 2, r"the prompts have 16 video placeholders, the grids \[\(4, 4, 4\)\] need 64"),
        (lambda x: x * 0, "positive multiples of the merge size 0"),
    ):
        refused(message, model, changed("video_llama_3", video_merge_sizes=change))
    mask = {**changed("video_llama_3"), "video_compression_mask": torch.ones(15, dtype=torch.bool)}
    refused(r"video_compression_mask \[15\] must be \[16\]", model, mask)
    mask["video_compression_mask"] = torch.arange(16) > 0
    refused(r"the prompts have 16 video placeholders, the grids \[\(4, 2, 2\)\] need 15", model, mask)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_inputs_that_are_no_tensors_of_a_batch(family):
    model, pixels = hf.tiny(family), adapter_of(hf.tiny(family)).pixels
    for name in ("input_ids", "attention_mask", pixels):
        refused(
            rf"{name} is a list, it must be a tensor \[.*\]\. Pass return_tensors='pt'",
            model,
            changed(family, **{name: list}),
            error=TypeError,
        )
    unbatched = {"input_ids": lambda x: x[0], "attention_mask": lambda x: x[0]}
    refused(r"input_ids \[\d+\] must be \[B, L\]\. Pass .*return_tensors='pt'", model, changed(family, **unbatched))
    refused(rf"{pixels} \[.*\] must be \[.*\]\. Pass", model, changed(family, **{pixels: lambda x: x[0]}))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_masks_that_are_none(family):
    model, kind = hf.tiny(family), "image" if family in ("internvl", "smolvlm") else "video"
    for change, value in ((lambda x: x * 2, "2"), (lambda x: x - 2, "-1"), (lambda x: x * torch.nan, "nan")):
        refused(
            rf"attention_mask holds {value}, it must be 1 at tokens and 0 at padding\. Pass",
            model,
            changed(family, attention_mask=change),
        )
    ids, mask = (hf.batch(family).inputs[name] for name in ("input_ids", "attention_mask"))
    first = int(torch.isin(ids[0], torch.tensor([hf.IMAGE, hf.VIDEO])).nonzero()[0])
    mask[0, : first + 2] = 0
    refused(
        rf"attention_mask hides 2 of the \d+ {kind} placeholders of row 0\. Mask padding alone",
        model,
        changed(family, attention_mask=lambda _: mask),
    )
    wanted = prune_inputs(model, changed(family), scores, keep_ratio=0.5)
    for kind in (torch.bool, torch.int32, torch.float32):
        found = prune_inputs(model, changed(family, attention_mask=lambda x: x.to(kind)), scores, keep_ratio=0.5)  # noqa: B023
        assert torch.equal(found["position_ids"], wanted["position_ids"])
        assert torch.equal(found["attention_mask"], wanted["attention_mask"])


@pytest.mark.parametrize("stage", ["prefill", "kv"])
@pytest.mark.parametrize("ends", [None, 7, [7, hf.PAD]])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_without_a_mask_padding_is_what_generate_takes_for_it(family, ends, stage):
    model = copy.copy(hf.tiny(family))
    model.generation_config = transformers.GenerationConfig(pad_token_id=hf.PAD, eos_token_id=ends)
    inputs = changed(family, hf.RAGGED, attention_mask=None)
    plain = {name: value for name, value in inputs.items() if name != "visuals"}
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**plain, **options)
    with compress(model, scores, keep_ratio=1.0, stage=stage):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
    lengths = prune_inputs(model, inputs, scores, keep_ratio=1.0)["attention_mask"].sum(1)
    told = ends is None or ends == 7
    real = hf.batch(family, hf.RAGGED).inputs["attention_mask"].sum(1)
    assert torch.equal(lengths, real if told else torch.full_like(real, inputs["input_ids"].shape[1]))


def test_padding_inside_a_prompt_that_only_its_ids_tell():
    inputs = changed("llava_onevision", attention_mask=None)
    inputs["input_ids"][0, -2] = hf.PAD
    message = "row 0 is padded on the right or inside, by the ids, for want of attention_mask"
    refused(message, hf.tiny("llava_onevision"), inputs)


@pytest.mark.parametrize("budget", ["video", "frames"])
def test_scores_that_are_no_numbers(budget):
    model, inputs = hf.tiny("llava_onevision"), hf.batch("llava_onevision").inputs

    def one(value):
        return lambda x, grid: scores(x, grid).index_fill(0, torch.tensor([3]), value)

    refused(r"1 scores are NaN\. Clean them, or pass check='flag'", model, inputs, one(torch.nan), budget=budget)
    with (
        pytest.raises(ValueError, match="scores are NaN"),
        compress(model, one(torch.nan), keep_ratio=0.5, stage="kv", budget=budget),
    ):
        model.generate(**inputs, max_new_tokens=2)
    prune_inputs(model, inputs, one(torch.nan), keep_ratio=0.5, budget=budget, check="flag")
    for value in (torch.inf, -torch.inf):  # must stay, must go
        out = prune_inputs(model, inputs, one(value), keep_ratio=0.5, budget=budget)
        assert (out["position_ids"] == 3 + 3).any() == (value > 0)


def test_a_policy_whose_weights_are_no_numbers():
    policy = policy_of("llava_onevision")
    with torch.no_grad():
        next(policy.token_compress.parameters()).fill_(torch.nan)
    model, inputs = hf.tiny("llava_onevision"), hf.batch("llava_onevision").inputs
    for budget in ("frames", "video"):
        refused("scores are NaN", model, inputs, policy, budget=budget)
