"""A short clip of moving shapes, for a demo that needs no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT, RATE = 640, 360, 24

BACKGROUNDS = (((38, 58, 82), (96, 132, 150)), ((94, 66, 46), (190, 158, 112)))
SHAPES = (  # kind, colour, radius, centre, travel (fractions of the frame), turns, first and last moment
    ("disc", (240, 196, 64), 46, (0.12, 0.30), (0.78, 0.25), 0.0, (0.0, 1.0)),
    ("square", (220, 82, 70), 40, (0.86, 0.74), (-0.62, -0.10), 1.2, (0.0, 0.62)),
    ("triangle", (92, 200, 140), 52, (0.30, 0.95), (0.30, -0.62), -0.7, (0.30, 1.0)),
    ("ring", (235, 235, 240), 44, (0.78, 0.20), (-0.25, 0.48), 0.0, (0.62, 1.0)),
)


def render_clip(
    path: str | Path,
    *,
    seconds: float = 6.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Render coloured shapes that move over two textured scenes and encode them to an mp4 file.

    Args:
        path: file to write.
        seconds: length of the clip, > 0; the scene changes at 62 % of it.
        seed: seed of the texture.
        progress: is told the fraction that has been written.
    """
    num_frames = max(2, round(seconds * RATE))
    scenes = [_texture(np.random.default_rng(seed + i), *colours) for i, colours in enumerate(BACKGROUNDS)]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=RATE, options={"crf": "20"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.bit_rate = 0 if codec == "libx264" else 2_000_000
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(_draw(scenes, i / (num_frames - 1)), format="rgb24")
            container.mux(stream.encode(frame))
            progress((i + 1) / num_frames)
        container.mux(stream.encode(None))


def write_lossless(frames: np.ndarray, path: str | Path, *, rate: int = 2) -> None:
    """Encode frames `[T, H, W, 3]` uint8, RGB, so that they are read back as they are.

    Args:
        frames: the pictures.
        path: file to write, of a container that takes FFV1: `.mkv` or `.avi`.
        rate: frames per second.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def _texture(rng: np.random.Generator, dark: tuple[int, ...], light: tuple[int, ...]) -> np.ndarray:
    """Smooth noise between two colours, a quarter wider than the frame: `[H, 5/4 W, 3]` float32."""
    height, width = HEIGHT, WIDTH * 5 // 4
    noise = np.zeros((height, width))
    for cells in (4, 9, 20, 60):
        knots = rng.random((cells + 1, 2 * cells + 1))
        y, x = np.linspace(0, cells, height, endpoint=False), np.linspace(0, 2 * cells, width, endpoint=False)
        top, left = y.astype(int)[:, None], x.astype(int)
        fy, fx = ((f * f * (3 - 2 * f)) for f in ((y % 1)[:, None], x % 1))
        upper = knots[top, left] * (1 - fx) + knots[top, left + 1] * fx
        lower = knots[top + 1, left] * (1 - fx) + knots[top + 1, left + 1] * fx
        noise += (upper * (1 - fy) + lower * fy) / cells**0.7
    noise = (noise - noise.min()) / np.ptp(noise)
    return (np.array(dark) + noise[..., None] * (np.array(light) - np.array(dark))).astype(np.float32)


def _draw(scenes: list[np.ndarray], moment: float) -> np.ndarray:
    """The picture at a moment in [0, 1]."""
    scene = scenes[moment >= 0.62]
    shift = round(moment * (scene.shape[1] - WIDTH))
    picture = scene[:, shift : shift + WIDTH].copy()
    for kind, colour, radius, centre, travel, turns, (first, last) in SHAPES:
        if not first <= moment <= last:
            continue
        age = (moment - first) / (last - first)
        cx, cy = (centre[0] + travel[0] * age) * WIDTH, (centre[1] + travel[1] * age) * HEIGHT
        reach = round(1.5 * radius) + 18
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        window = picture[top : max(0, int(cy) + reach), left : max(0, int(cx) + reach)]
        y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
        y, x = y + (top - cy), x + (left - cx)
        angle = 2 * np.pi * turns * age
        shadow = np.clip(1 - _distance(kind, x - 4, y - 6, angle, radius) / 9, 0, 1)[..., None]
        # One pixel of antialiasing.
        cover = np.clip(0.5 - _distance(kind, x, y, angle, radius), 0, 1)[..., None]
        window *= 1 - 0.45 * shadow
        window += cover * (np.array(colour) - window)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _distance(kind: str, x: np.ndarray, y: np.ndarray, angle: float, radius: float) -> np.ndarray:
    """Signed distance in pixels from the outline of a shape turned by `angle`; negative inside."""
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "square":
        return np.maximum(np.abs(u), np.abs(v)) - radius
    if kind == "triangle":
        return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - radius / 2
    if kind == "ring":
        return np.abs(np.hypot(u, v) - radius) - radius / 4
    return np.hypot(u, v) - radius
