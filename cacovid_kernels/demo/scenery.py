"""Pictures of the procedural world: sprites, glow and flicker over a textured background that moves."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cacovid_kernels.demo.world import COLOURS, SIDE, Scenes, uniforms

CELL = 8  # pixels per side of a cell
SIZE = SIDE * CELL

RGB = np.array(
    [(214, 40, 40), (240, 130, 20), (235, 215, 50), (40, 170, 60),
     (60, 205, 215), (45, 80, 215), (130, 50, 170), (240, 120, 190)]
)  # fmt: skip
GLOW = 245
_SPRITES = (
    "###### ###### ###### ###### ###### ######",
    "###### ###### ##..## ##..## ###### ######",
    "..##.. .####. ###### ###### .####. ..##..",
    "..##.. ..##.. .####. .####. ###### ######",
    "..##.. ..##.. ###### ###### ..##.. ..##..",
    "##..## ###### .####. .####. ###### ##..##",
    "...... ...... ###### ###### ...... ......",
    "..##.. ..##.. ..##.. ..##.. ..##.. ..##..",
)
_TEXTURES, _ATLAS = 16, 128
_STREAM_LOOK, _STREAM_BRIGHTNESS = 3, 4


# [shape, CELL, CELL] bool: each shape in the middle of its cell.
SPRITES = np.pad([[[c == "#" for c in row] for row in sprite.split()] for sprite in _SPRITES], ((0, 0), (1, 1), (1, 1)))


@lru_cache
def _atlas() -> tuple[np.ndarray, np.ndarray]:
    """Levels `[K, A, A]` uint8 of periodic smooth noise, and coloured noise `[64, CELL, CELL, 3]` uint8."""
    rng = np.random.default_rng(1)
    frequency = np.hypot(np.fft.fftfreq(_ATLAS)[:, None], np.fft.fftfreq(_ATLAS))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((_TEXTURES, _ATLAS, _ATLAS))
    fall = np.linspace(0.6, 1.6, _TEXTURES)[:, None, None]
    smooth = np.fft.ifft2(np.fft.fft2(noise) / frequency**fall).real
    smooth = (smooth - smooth.mean((1, 2), keepdims=True)) / smooth.std((1, 2), keepdims=True)
    levels = np.clip(128 + 48 * smooth, 0, 255).astype(np.uint8)
    colours = RGB[rng.integers(0, len(COLOURS), (64, CELL, CELL))]
    return levels, np.where(rng.random((64, CELL, CELL, 1)) < 0.2, GLOW, colours).astype(np.uint8)


def paint(scenes: Scenes) -> np.ndarray:
    """Render the videos: `[N, T, SIZE, SIZE, 3]` uint8, RGB."""
    frames = _background(scenes)
    n, t = frames.shape[:2]
    tiles = frames.reshape(n, t, SIDE, CELL, SIDE, CELL, 3)

    top = scenes.top()
    i, f, cell = np.nonzero(scenes.flicker & (top < 0))
    tiles[i, f, cell // SIDE, :, cell % SIDE] = _atlas()[1][(scenes.index[i] * 7 + f * 31 + cell * 13) % 64]

    u = uniforms(scenes.seed, scenes.index, scenes.shape.shape[1], _STREAM_BRIGHTNESS)
    look = RGB * (0.86 + 0.14 * u[:, :, None, None])  # [N, M, COLOURS, 3]: objects differ in brightness
    i, f, cell = np.nonzero(top >= 0)
    m = top[i, f, cell]
    sprite = SPRITES[scenes.shape[i, m]][..., None]
    under = tiles[i, f, cell // SIDE, :, cell % SIDE]
    under = np.where(scenes.glows[i, m, f][:, None, None, None], np.uint8(GLOW), under)
    colour = look[i, m, scenes.colour[i, m, f]].astype(np.uint8)[:, None, None]
    tiles[i, f, cell // SIDE, :, cell % SIDE] = np.where(sprite, colour, under)
    return frames


def _background(scenes: Scenes) -> np.ndarray:
    """Smooth noise between two dull colours, seen by a camera that moves up to 3 pixels per frame."""
    n, frames = len(scenes), scenes.alive.shape[2]
    u = uniforms(scenes.seed, scenes.index, 16, _STREAM_LOOK)
    dark, light = 20 + 70 * u[:, None, 0:3], 90 + 90 * u[:, None, 3:6]
    table = (dark + np.linspace(0, 1, 256)[:, None] * (light - dark)).astype(np.uint8)  # [N, 256, 3]
    texture = (u[:, 6] * _TEXTURES).astype(int)
    shift = (u[:, 7:9] * _ATLAS)[:, None] + np.arange(frames)[:, None] * (u[:, None, 9:11] * 6 - 3)
    ys, xs = ((shift[..., axis, None] + np.arange(SIZE)).astype(int) % _ATLAS for axis in (0, 1))
    levels = _atlas()[0][texture[:, None, None, None], ys[..., :, None], xs[..., None, :]]
    return table[np.arange(n)[:, None, None, None], levels]
