"""A procedural world of short videos with known truth: who is where, in which colour, at every moment.

A video has a cast of objects on a grid of cells; one cell is one video token. Seven objects are asked about and
can be named without doubt: by a shape or a colour that nobody else has, or by a pair of both. The others are
clutter: they live as long, move, change colour and glow the same way, and share the named one's other looks.
Everything is a function of (seed, index); thousands of videos are drawn at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cacovid_kernels.reference.random import philox

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("square", "ring", "diamond", "triangle", "cross", "star", "bar", "pole")
DIRECTIONS = ("right", "left", "down", "up")
STEPS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])  # rows and columns per frame

SIDE = 6  # cells per row and per column
CELLS = SIDE * SIDE

# The objects asked about, in the order in which they are cast; drawn over the clutter, never over each other.
BY_SHAPE, BY_COLOUR, GLOWING, STANDING, MOVING, ONE, OTHER = range(7)
NAMED = 7
STAY, MOVE, CHANGE = range(3)
MOVE_FRAMES, CHANGE_FRAMES = 3, 4

# Words of randomness per video: stream of each use.
_STREAM_CAST, _STREAM_TRACK, _STREAM_SCENERY = range(3)


@dataclass(frozen=True)
class WorldConfig:
    """Size of the world.

    Args:
        frames: frames of a video, 8 to 16.
        clutter: objects besides the seven named ones, per 8 frames.
        flicker: cells per frame, in the mean, that show coloured noise for that frame alone.
    """

    frames: int = 8
    clutter: int = 30
    flicker: float = 2.0

    def __post_init__(self) -> None:
        if not 8 <= self.frames <= 16:
            raise ValueError(f"WorldConfig: frames={self.frames} must be in [8, 16].")

    @property
    def tokens(self) -> int:
        return self.frames * CELLS


@dataclass(frozen=True)
class Scenes:
    """The truth of N videos with M objects over T frames; the first `NAMED` objects are those asked about."""

    seed: int
    index: np.ndarray  # [N] int64
    shape: np.ndarray  # [N, M] of SHAPES
    colour: np.ndarray  # [N, M, T] of COLOURS
    cell: np.ndarray  # [N, M, T] row * SIDE + column
    alive: np.ndarray  # [N, M, T] bool: in the picture, not yet asking who hides it
    glows: np.ndarray  # [N, M, T] bool
    moves: np.ndarray  # [N, M] bool
    direction: np.ndarray  # [N, M] of DIRECTIONS; of movers alone
    flicker: np.ndarray  # [N, T, CELLS] bool: coloured noise instead of the background

    def __len__(self) -> int:
        return len(self.index)

    def top(self) -> np.ndarray:
        """`[N, T, CELLS]`: the object seen in each cell, -1 for none. Named ones hide clutter, the first the rest."""
        n, objects, frames = self.alive.shape
        top = np.full((n, frames, CELLS), -1, np.int16)
        for m in reversed(range(objects)):
            i, t = np.nonzero(self.alive[:, m])
            top[i, t, self.cell[i, m, t]] = m
        return top


def uniforms(seed: int, index: np.ndarray, count: int, stream: int) -> np.ndarray:
    """`[N, count]` float64 in [0, 1): Philox words named by (seed, index, number, stream)."""
    rows = torch.from_numpy(np.asarray(index, np.int64))[:, None]
    block = torch.arange(-(-count // 4))[None].expand(len(rows), -1)
    low, high = (rows & 0xFFFFFFFF).expand_as(block), (rows >> 32).expand_as(block)
    words = torch.stack(philox([block, low, high, torch.full_like(block, stream)], seed), -1)
    return words.flatten(1)[:, :count].numpy() * 2.0**-32


def draw(seed: int, index: Sequence[int] | np.ndarray, config: WorldConfig = WorldConfig()) -> Scenes:
    """Draw the videos (seed, index).

    Args:
        seed: of the world, in [0, 2^64).
        index: numbers of the videos.
        config: size of the world.

    Returns:
        Their truth. A video does not depend on the others drawn with it.
    """
    index = np.asarray(index, np.int64)
    objects = NAMED + round(config.clutter * config.frames / 8)
    shape, colour = _cast(uniforms(seed, index, 80 + objects, _STREAM_CAST), objects)
    u = uniforms(seed, index, objects * 10 + CELLS, _STREAM_TRACK)
    order = u[:, objects * 10 :]
    u = u[:, : objects * 10].reshape(len(index), objects, 10)
    kind, start, length = _lives(u, config.frames)
    direction = (u[..., 4] * 4).astype(np.int64)
    age = np.arange(config.frames) - start[..., None]  # [N, M, T]
    alive = (age >= 0) & (age < length[..., None])

    first = _first_cells(u, kind, direction, order)  # [N, M, 2]
    steps = np.where(kind[..., None] == MOVE, STEPS[direction], 0)
    place = first[:, :, None] + steps[:, :, None] * np.clip(age, 0, MOVE_FRAMES - 1)[..., None]
    cell = place[..., 0] * SIDE + place[..., 1]

    changes = kind[..., None] == CHANGE
    colours = np.where(changes, _changing(colour[..., :1], u[..., 5], age), colour)
    glowing = (length * u[..., 6]).astype(np.int64)  # the age at which it glows
    glows = changes & (age == glowing[..., None]) & alive
    for m in (BY_COLOUR, STANDING, ONE):  # nobody takes on the look by which these are named
        taken = colours == colour[:, m : m + 1]
        if m == STANDING:
            taken &= (shape == shape[:, m : m + 1])[..., None]
        colours = np.where(changes & taken, colour, colours)
    flicker = uniforms(seed, index, config.tokens, _STREAM_SCENERY) < config.flicker / CELLS
    return Scenes(
        seed,
        index,
        shape,
        colours,
        cell,
        alive,
        glows,
        kind == MOVE,
        direction,
        flicker.reshape(-1, config.frames, CELLS),
    )


def _cast(u: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Shapes `[N, M]` and first colours `[N, M, 1]`, so that each named object has a name of its own."""
    n = np.arange(len(u))
    shapes, colours = u[:, :8].argsort(1), u[:, 8:16].argsort(1)
    # Shapes 0 to 2 and colour 0 have one owner, colour 1 has two; everybody else is a pair of the rest.
    pairs = u[:, 16:46].argsort(1)  # [N, 30]
    clutter = np.take_along_axis(pairs, 1 + (u[:, 80 + NAMED :] * 29).astype(int), 1)
    shape = np.empty((len(u), objects), np.int64)
    colour = np.empty((len(u), objects), np.int64)
    for some, pair in ((slice(STANDING, STANDING + 1), pairs[:, :1]), (slice(NAMED, None), clutter)):
        shape[:, some] = np.take_along_axis(shapes, 3 + pair // 6, 1)
        colour[:, some] = np.take_along_axis(colours, 2 + pair % 6, 1)
    for word, m in enumerate((BY_SHAPE, GLOWING, MOVING)):
        shape[:, m] = shapes[:, word]
        colour[:, m] = colours[n, 2 + (u[:, 46 + m] * 6).astype(int)]
    colour[:, BY_COLOUR], colour[:, ONE], colour[:, OTHER] = colours[:, 0], colours[:, 1], colours[:, 1]
    others = u[:, 54:59].argsort(1)
    for m in (BY_COLOUR, ONE, OTHER):
        shape[:, m] = shapes[n, 3 + others[:, m % 3]]
    return shape, colour[..., None]


def _lives(u: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each object does, when it comes and for how many frames: `[N, M]` each."""
    kind = np.searchsorted([0.55, 0.8], u[..., 0], side="right")
    kind[:, :NAMED] = STAY
    kind[:, GLOWING], kind[:, MOVING] = CHANGE, MOVE
    length = np.choose(kind, [1 + (u[..., 1] * 3).astype(int), MOVE_FRAMES, CHANGE_FRAMES])
    length[:, [BY_SHAPE, BY_COLOUR, STANDING]] = 2
    length[:, [ONE, OTHER]] = np.minimum(length[:, [ONE, OTHER]], 2)
    start = (u[..., 2] * (frames - length + 1)).astype(int)
    # Of the two whose order is asked for, one is gone before the other comes.
    early = (u[:, ONE, 2] * (frames - 3)).astype(int)
    late = early + 2 + (u[:, OTHER, 2] * (frames - 3 - early)).astype(int)
    swap = u[:, ONE, 3] < 0.5
    start[:, ONE], start[:, OTHER] = np.where(swap, late, early), np.where(swap, early, late)
    return kind, start, length


def _first_cells(u: np.ndarray, kind: np.ndarray, direction: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Row and column `[N, M, 2]` where each object begins; no two named ones ever share a cell."""
    # A mover's way stays inside the picture.
    reach = STEPS[direction] * (MOVE_FRAMES - 1) * (kind[..., None] == MOVE)
    first = -np.minimum(reach, 0) + (u[..., 7:9] * (SIDE - np.abs(reach))).astype(int)
    way = first[:, MOVING, None] + np.arange(MOVE_FRAMES)[:, None] * STEPS[direction[:, MOVING], None]
    order = order.copy()
    np.put_along_axis(order, way[..., 0] * SIDE + way[..., 1], 2.0, 1)  # comes last
    cells = order.argsort(1)[:, : NAMED - 1]
    others = [m for m in range(NAMED) if m != MOVING]
    first[:, others] = np.stack([cells // SIDE, cells % SIDE], -1)
    return first


def _changing(colour: np.ndarray, u: np.ndarray, age: np.ndarray) -> np.ndarray:
    """A new colour at every age: steps of 1, 3, 5 or 7 around the eight."""
    return (colour + (1 + 2 * (u * 4).astype(int))[..., None] * np.clip(age, 0, None)) % len(COLOURS)
