"""Real processors for the tiny models of `hf_models`: a token per letter, the marks at the ids of the models."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from hf_models import END, IMAGE, PAD, START, VIDEO, need_transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

LETTERS = sorted(letter for letter in pre_tokenizers.ByteLevel.alphabet() if ord(letter) < 127 or letter in "ĊĠ")
OTHER_MARKS = range(END + 1, 200)
SQUARE = {"height": 16, "width": 16}
LONGEST = {"longest_edge": 16}
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 16 * 16 * 64}}


def tokenizer(image: str, video: str, *others: str, **named: str) -> Any:
    marks = {"<pad>": PAD, "<|vision_start|>": START, "<|vision_end|>": END, image: IMAGE, video: VIDEO}
    marks |= dict(zip(others, OTHER_MARKS, strict=False))
    fast = Tokenizer(BPE({**marks, **{letter: i for i, letter in enumerate(LETTERS, 10)}}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(marks))
    named = {"image_token": image, "video_token": video, **named}
    return hf.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", extra_special_tokens=named)


def template(video: str) -> str:
    return (
        "{% for message in messages %}{{ message['role'] }}: {% for item in message['content'] %}"
        "{% if item['type'] == 'video' %}" + video + "{% else %}{{ item['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def processor(family: str) -> Any:
    """The processor of a family, sized for its tiny model; skips the test where something that it needs is missing."""
    letters = tokenizer("<image>", "<video>")
    plain = {"chat_template": template("<video>")}
    if family == "llava_onevision":
        return hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=[[16, 16]]),
            letters,
            hf.LlavaOnevisionVideoProcessor(size=SQUARE),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **plain,
        )
    clip = {"size": SQUARE, "crop_size": SQUARE}
    if family == "llava_next_video":
        return hf.LlavaNextVideoProcessor(
            hf.LlavaNextVideoVideoProcessor(**clip),
            hf.LlavaNextImageProcessor(**clip),
            letters,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **plain,
        )
    if family == "video_llava":
        need_transformers((5, 15), "a chat template of Video-LLaVA")
        return hf.VideoLlavaProcessor(
            hf.VideoLlavaImageProcessor(**clip),
            hf.VideoLlavaVideoProcessor(**clip),
            letters,
            patch_size=4,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=1,
            **plain,
        )
    if family.startswith("qwen"):
        name, videos = {
            "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
            "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
            "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        }[family]
        sizes = {**PATCHES, "temporal_patch_size": 2}
        return getattr(hf, name)(
            hf.Qwen2VLImageProcessor(**sizes),
            tokenizer("<|image_pad|>", "<|video_pad|>"),
            getattr(hf, videos)(**sizes),
            chat_template=template("<|vision_start|><|video_pad|><|vision_end|>"),
        )
    if family == "internvl":
        marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        return hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=False),
            tokenizer("<IMG_CONTEXT>", "<video>", "<img>", "</img>", **marks),
            hf.InternVLVideoProcessor(size=SQUARE),
            image_seq_length=4,
            chat_template=template("<video>\n"),
        )
    if family == "video_llama_3":
        return hf.VideoLlama3Processor(
            hf.VideoLlama3ImageProcessor(**{**PATCHES, "merge_size": 1}),
            letters,
            hf.VideoLlama3VideoProcessor(**PATCHES),
            **plain,
        )
    pytest.importorskip("num2words", reason="SmolVLM's processor writes numbers as words")
    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    sizes = {"size": LONGEST, "max_image_size": LONGEST}
    return hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**sizes, do_image_splitting=False),
        tokenizer("<image>", "<video>", *marks.values(), **marks),
        hf.SmolVLMVideoProcessor(**sizes, video_sampling={"fps": 1, "max_frames": 8, "video_size": LONGEST}),
        image_seq_len=4,
        **plain,
    )
