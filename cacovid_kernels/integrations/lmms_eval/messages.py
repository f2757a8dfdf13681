"""Messages of a task of lmms-eval as a processor of transformers takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cacovid_kernels.video import read_clip
from cacovid_kernels.video_models.processed import metadata

OP = "cacovid"


@dataclass
class Conversations:
    """What a batch asks, with its videos read."""

    messages: list[Any] = field(default_factory=list)  # per prompt, for `apply_chat_template`
    videos: list[dict[str, Any]] = field(default_factory=list)  # per video of all prompts, for `video_metadata`
    images: int = 0  # of all prompts


def read(batch: Sequence[Any], max_num_frames: int) -> Conversations:
    """Reads the videos of a batch of prompts; images are left as they are.

    Args:
        batch: messages per prompt, as `doc_to_messages` of a task makes them.
        max_num_frames: frames per video, >= 1, spread evenly over its time; a shorter one gives all it has.

    Raises:
        ValueError: anything but text, images and whole video files.
        UserError: a file that is no readable video.
    """
    out = Conversations()
    for prompt in batch:
        out.messages.append([{**message, "content": _content(message, max_num_frames, out)} for message in prompt])
    return out


def _content(message: dict[str, Any], max_num_frames: int, out: Conversations) -> list[dict[str, Any]]:
    content = []
    for item in message["content"]:
        kind = item["type"]
        if kind == "video":
            frames, video = _frames(item, max_num_frames)
            out.videos.append(video)
            item = {"type": "video", "video": frames}
        elif kind == "image":
            out.images += 1
            item = {"type": "image", "image": item["url"]}
        elif kind != "text":
            raise ValueError(f"{OP}: a message holds {kind}. Use tasks of text, images and videos.")
        content.append(item)
    return content


def _frames(item: dict[str, Any], max_num_frames: int) -> tuple[Any, dict[str, Any]]:
    """Frames `[T, H, W, 3]` uint8 of one video, and which of its frames they are."""
    if not isinstance(item["url"], str):
        raise ValueError(f"{OP}: a video is a {type(item['url']).__name__}. Use tasks that name video files.")
    if item.get("start_time") is not None or item.get("end_time") is not None:
        raise ValueError(f"{OP}: {item['url']} is to be cut in time. Cut the file, and leave start and end out.")
    clip = read_clip(item["url"], max_num_frames)
    return clip.frames, metadata(clip.timestamps, clip.duration)
