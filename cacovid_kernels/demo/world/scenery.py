"""Pictures of the procedural world: sprites, glow, lines of motion and flicker over a textured background that moves.

One token shows what can be asked about it: its sprite, which way that moves (a line follows it), and how late
it is (the light turns from warm to cool while a video goes on).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cacovid_kernels.demo.world.scenes import COLOURS, SIDE, STEPS, Scenes, uniforms

CELL = 8  # pixels per side of a cell
SIZE = SIDE * CELL

RGB = np.array(
    [(214, 40, 40), (240, 130, 20), (235, 215, 50), (40, 170, 60),
     (60, 205, 215), (45, 80, 215), (130, 50, 170), (240, 120, 190)]
)  # fmt: skip
GLOW = 245
WARMTH = np.array((36, 0, -36))  # of the first frame's light; the last frame's is its opposite
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
    sprites, lines = _moved_sprites()
    heading = np.where(scenes.moves, scenes.direction, len(STEPS))[i, m]
    sprite = sprites[heading, scenes.shape[i, m]][..., None]
    under = tiles[i, f, cell // SIDE, :, cell % SIDE]
    under = np.where(scenes.glows[i, m, f][:, None, None, None], np.uint8(GLOW), under)
    colour = look[i, m, scenes.colour[i, m, f]].astype(np.uint8)[:, None, None]
    tiles[i, f, cell // SIDE, :, cell % SIDE] = np.where(sprite | lines[heading, 0, ..., None], colour, under)
    return frames


@lru_cache
def _moved_sprites() -> tuple[np.ndarray, np.ndarray]:
    """`[5, shape, CELL, CELL]` and `[5, 1, CELL, CELL]` bool: sprites a pixel ahead and the line that follows them.

    By direction; the last stands still and has none.
    """
    ahead = np.stack([np.roll(SPRITES, tuple(step), (1, 2)) for step in STEPS])
    behind = np.zeros((len(STEPS), 1, CELL, CELL), bool)
    for line, (down, right) in zip(behind[:, 0], STEPS, strict=True):
        line[{1: 0, -1: -1, 0: slice(None)}[down], {1: 0, -1: -1, 0: slice(None)}[right]] = True
    return np.concatenate([ahead, SPRITES[None]]), np.concatenate([behind, np.zeros_like(behind[:1])])


def _background(scenes: Scenes) -> np.ndarray:
    """Smooth noise between two dull colours, seen by a camera that moves up to 3 pixels per frame."""
    n, frames = len(scenes), scenes.alive.shape[2]
    u = uniforms(scenes.seed, scenes.index, 16, _STREAM_LOOK)
    dark, light = (
        40 + 20 * u[:, None, 0:3] + 40 * u[:, None, 11:12],
        110 + 20 * u[:, None, 3:6] + 60 * u[:, None, 12:13],
    )
    table = dark + np.linspace(0, 1, 256)[:, None] * (light - dark)
    light_of_day = np.linspace(1, -1, frames)[:, None] * WARMTH
    table = (table[:, None] + light_of_day[:, None]).astype(np.uint8)  # [N, T, 256, 3]
    texture = (u[:, 6] * _TEXTURES).astype(int)
    shift = (u[:, 7:9] * _ATLAS)[:, None] + np.arange(frames)[:, None] * (u[:, None, 9:11] * 6 - 3)
    ys, xs = ((shift[..., axis, None] + np.arange(SIZE)).astype(int) % _ATLAS for axis in (0, 1))
    levels = _atlas()[0][texture[:, None, None, None], ys[..., :, None], xs[..., None, :]]
    return table[np.arange(n)[:, None, None, None], np.arange(frames)[:, None, None], levels]
