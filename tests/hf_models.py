"""Tiny random Video-LLMs of every family, and prompts for them as their processors lay them out."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

VOCABULARY, IMAGE, VIDEO, START, END, PAD = 200, 151, 152, 153, 154, 0
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # larger than usual: logits of order 1 make comparisons sharp
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_TOKENS = 4  # of every image below

FAMILIES = (
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "video_llama_3",
    "smolvlm",
)
_SINCE = {"qwen3_vl": (5, 18), "qwen3_vl_moe": (5, 18)}  # transformers
_VERSION = tuple(int(part) for part in hf.__version__.split(".")[:2])
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def _config(family: str) -> Any:
    siglip = {"model_type": "siglip_vision_model", **CLIP, "image_size": 16, "patch_size": 4, "vision_use_head": False}
    clip = {"model_type": "clip_vision_model", **CLIP, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    qwen2, llama = {"model_type": "qwen2", **TEXT}, {"model_type": "llama", **TEXT}
    legacy = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    marks = {**TOKENS, "vision_start_token_id": START, "vision_end_token_id": END}
    patches = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
    if family == "llava_onevision":
        return hf.LlavaOnevisionConfig(
            text_config=qwen2,
            vision_config=siglip,
            **legacy,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[16, 16]],
        )
    if family == "llava_next_video":
        return hf.LlavaNextVideoConfig(
            text_config=llama, vision_config=clip, **legacy, vision_feature_layer=-2, image_grid_pinpoints=[[16, 16]]
        )
    if family == "video_llava":
        return hf.VideoLlavaConfig(text_config=llama, vision_config=clip, **legacy, vision_feature_layer=-2)
    if family == "qwen2_vl":
        vision = {**patches, "embed_dim": 32, "hidden_size": 32}
        return hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **marks)
    if family == "qwen2_5_vl":
        vision = {**patches, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        return hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **marks)
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        vision = {**patches, "depth": 4, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2], "in_channels": 3}
        text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
        if family == "qwen3_vl":
            return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **marks)
    if family == "internvl":
        vision = {**CLIP, "image_size": [16, 16], "patch_size": [4, 4]}
        return hf.InternVLConfig(text_config=qwen2, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    if family == "video_llama_3":
        vision = {**CLIP, "patch_size": 4, "num_channels": 3}
        return hf.VideoLlama3Config(text_config=qwen2, vision_config=vision, **TOKENS)
    vision = {**CLIP, "image_size": 16, "patch_size": 4}
    return hf.SmolVLMConfig(text_config=llama, vision_config=vision, image_token_id=IMAGE, scale_factor=2)


_CLASSES = {
    "llava_onevision": "LlavaOnevision",
    "llava_next_video": "LlavaNextVideo",
    "video_llava": "VideoLlava",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "internvl": "InternVL",
    "video_llama_3": "VideoLlama3",
    "smolvlm": "SmolVLM",
}


def need_transformers(version: tuple[int, int], what: str) -> None:
    """Skips the test where transformers is older."""
    if version > _VERSION:
        pytest.skip(f"{what} needs transformers >= {version}, installed is {hf.__version__}")


@lru_cache
def tiny(family: str) -> Any:
    """A random model of a family, float32, in evaluation mode; skips the test where transformers is too old for it."""
    need_transformers(_SINCE.get(family, (5, 10)), family)
    config = _config(family)
    config.get_text_config().pad_token_id = PAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(hf, _CLASSES[family] + "ForConditionalGeneration")(config).eval()
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD)
    return model.requires_grad_(False)


@dataclass
class Rows:
    """A batch under construction: ids and, per token, whether it may be dropped and to which video it belongs."""

    ids: list[list[int]] = field(default_factory=list)
    video: list[list[int]] = field(default_factory=list)  # number of the video, -1 for what always stays
    videos: int = 0

    def row(self) -> None:
        self.ids.append([])
        self.video.append([])

    def text(self, *ids: int) -> None:
        self.ids[-1] += ids
        self.video[-1] += [-1] * len(ids)

    def tokens(self, placeholder: int, count: int, droppable: bool) -> None:
        self.ids[-1] += [placeholder] * count
        self.video[-1] += [self.videos if droppable else -1] * count


@dataclass
class Batch:
    """A processor's inputs and what a test has to know about them."""

    inputs: dict[str, Any]
    video: Tensor  # [B, L] number of the video a droppable token belongs to, else -1


# Every row: items in order; ("text", n), ("video", frames), ("image",)
SINGLE = [[("text", 3), ("video", 4), ("text", 5)]]
RAGGED = [
    [("text", 2), ("video", 4), ("text", 3)],
    [("text", 4), ("video", 4), ("text", 2), ("video", 4), ("text", 6)],
    [("text", 9), ("video", 4), ("text", 4)],
]
_PICTURE, _CLIP = [("text", 2), ("image",), ("text", 2)], [("video", 4), ("text", 3)]
MIXED = [_PICTURE + _CLIP + _CLIP + _PICTURE]


def batch(family: str, rows: list[list[tuple]] = SINGLE, seed: int = 0) -> Batch:
    """Prompts of a family with random pixels and text, padded on the left."""
    random = torch.Generator().manual_seed(seed)
    layout = Rows()
    pixels: dict[str, list[Tensor]] = {"video": [], "image": [], "row": []}
    grids: dict[str, list[list[int]]] = {"video": [], "image": []}
    visuals = []
    for items in rows:
        layout.row()
        tiles = []
        for item in items:
            if item[0] == "text":
                layout.text(*torch.randint(10, 140, (item[1],), generator=random).tolist())
            elif item[0] == "video":
                _add_video(family, layout, item[1], random, pixels, grids, tiles)
                visuals.append(("video", item[1]))
                layout.videos += 1
            else:
                _add_image(family, layout, random, pixels, grids, tiles)
                visuals.append(("image", 1))
        if tiles:
            pixels["row"].append(torch.stack(tiles))
    length = max(map(len, layout.ids))
    pad = [length - len(ids) for ids in layout.ids]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[PAD] * n + ids for n, ids in zip(pad, layout.ids, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (length - n) for n in pad]),
    }
    inputs |= _pixels(family, pixels, grids)
    if any(item[0] == "image" for items in rows for item in items) or any(
        sum(item[0] == "video" for item in items) > 1 for items in rows
    ):
        inputs |= {"visuals": visuals} if family in ("internvl", "smolvlm") else {}
    if family in MROPE_FAMILIES:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2 + (ids == IMAGE).int()
    video = torch.tensor([[-1] * n + marks for n, marks in zip(pad, layout.video, strict=True)])
    return Batch(inputs, video)


def _add_video(family, layout, frames, random, pixels, grids, tiles) -> None:
    per_frame = {"video_llava": 16}.get(family, 4)
    if family in ("llava_onevision", "llava_next_video", "video_llava"):
        pixels["video"].append(torch.randn(frames, 3, 16, 16, generator=random))
        for _ in range(frames):
            if family == "video_llava":
                layout.tokens(VIDEO, 1, droppable=False)
            layout.tokens(VIDEO, per_frame, droppable=True)
        if family == "llava_onevision":
            layout.tokens(VIDEO, 1, droppable=False)
    elif family in MROPE_FAMILIES:
        # Different grids in one batch: the second video is wider.
        t, h, w = frames // 2 + 1, 4, 4 + 4 * (len(grids["video"]) % 2)
        grids["video"].append([t, h, w])
        pixels["video"].append(torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=random))
        runs = [h * w // 4] * t if family.startswith("qwen3") else [t * h * w // 4]
        for frame, run in enumerate(runs):
            if family.startswith("qwen3"):
                layout.text(30 + frame, 31)  # "<0.5 seconds>"
            layout.text(START)
            layout.tokens(VIDEO, run, droppable=True)
            layout.text(END)
    elif family == "video_llama_3":
        grids["video"].append([frames, 4, 4])
        pixels["video"].append(torch.randn(frames * 16, 48, generator=random))
        for frame in range(frames):
            layout.text(30 + frame, 31)  # "Time 1.0s:"
            layout.tokens(VIDEO, per_frame, droppable=True)
            layout.text(32)  # ","
    else:
        for frame in range(frames):
            tiles.append(torch.randn(3, 16, 16, generator=random))
            layout.text(40, 30 + frame, 31, 35, START)  # "\nFrame1: <img>", "\nFrame from 00:01:<fake><global-img>"
            layout.tokens(IMAGE, per_frame, droppable=True)
            layout.text(END)


def _add_image(family, layout, random, pixels, grids, tiles) -> None:
    layout.text(START)
    if family in MROPE_FAMILIES or family == "video_llama_3":
        size = 3 * 2 * 4 * 4 if family in MROPE_FAMILIES else 48
        grids["image"].append([1, 4, 4])
        pixels["image"].append(torch.randn(16, size, generator=random))
        layout.tokens(IMAGE, IMAGE_TOKENS, droppable=False)
    elif family == "llava_onevision":
        pixels["image"].append(torch.randn(1, 3, 16, 16, generator=random))
        layout.tokens(IMAGE, 17, droppable=False)  # not pooled, and a newline
    elif family == "llava_next_video":
        pixels["image"].append(torch.randn(2, 3, 16, 16, generator=random))
        layout.tokens(IMAGE, 36, droppable=False)  # the whole image, then one tile with a newline per row
    elif family == "video_llava":
        pixels["image"].append(torch.randn(3, 16, 16, generator=random))
        layout.tokens(IMAGE, 16, droppable=False)
    else:
        tiles.append(torch.randn(3, 16, 16, generator=random))
        layout.tokens(IMAGE, IMAGE_TOKENS, droppable=False)
    layout.text(END)


def _pixels(family, pixels, grids) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if family in ("llava_onevision", "llava_next_video", "video_llava"):
        inputs["pixel_values_videos"] = torch.stack(pixels["video"])
        if pixels["image"]:
            known = inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters
            renamed = family == "video_llava" and "pixel_values" not in known  # below 5.23
            inputs["pixel_values_images" if renamed else "pixel_values"] = torch.stack(pixels["image"])
            if family != "video_llava":
                inputs["image_sizes"] = torch.tensor([[16, 16]] * len(pixels["image"]))
            if family == "llava_onevision":
                inputs["batch_num_images"] = torch.tensor([len(pixels["image"])])
    elif family in MROPE_FAMILIES or family == "video_llama_3":
        inputs["pixel_values_videos"] = torch.cat(pixels["video"])
        inputs["video_grid_thw"] = torch.tensor(grids["video"])
        if family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([1.0 + 0.5 * i for i in range(len(grids["video"]))])
        if family == "video_llama_3":
            inputs["video_merge_sizes"] = torch.tensor([2] * len(grids["video"]))
        if pixels["image"]:
            inputs["pixel_values"] = torch.cat(pixels["image"])
            inputs["image_grid_thw"] = torch.tensor(grids["image"])
            if family == "video_llama_3":
                inputs["image_merge_sizes"] = torch.tensor([2] * len(grids["image"]))
    elif family == "internvl":
        inputs["pixel_values"] = torch.cat(pixels["row"])
    else:
        most = max(map(len, pixels["row"]))
        rows = [torch.cat([row, row.new_zeros(most - len(row), 3, 16, 16)]) for row in pixels["row"]]
        inputs["pixel_values"] = torch.stack(rows)
    return inputs
