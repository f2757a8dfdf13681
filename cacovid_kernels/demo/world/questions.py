"""Questions on the procedural world, their answers and the video tokens that hold the evidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from cacovid_kernels.demo.world.scenes import (
    BY_COLOUR,
    BY_SHAPE,
    CELLS,
    COLOURS,
    DIRECTIONS,
    GLOWING,
    MOVING,
    ONE,
    OTHER,
    SHAPES,
    SIDE,
    STANDING,
    Scenes,
    uniforms,
)
from cacovid_kernels.video_models.llava_onevision import SPECIAL_TOKENS

KINDS = ("colour", "shape", "place", "direction", "event", "order")
PLACES = (
    "northwest", "north", "northeast",
    "west", "centre", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
_TEMPLATES = (
    "what colour is the {shape}",
    "which shape is {colour}",
    "where is the {colour} {shape}",
    "which way goes the {shape}",
    "what colour is the {shape} when it glows",
    "which comes {which} in {colour}",
)
ANSWERS = (*COLOURS, *SHAPES, *PLACES, *DIRECTIONS)
LABELS = (*COLOURS, *SHAPES, "glows", *PLACES, *DIRECTIONS, "first", "last")  # what can be said of one token
_STREAM_WORDS = 5
_CHAT_WORDS = ("user", "assistant")


@dataclass(frozen=True)
class Questions:
    """One question of every kind about each of N videos."""

    words: list[list[str]]  # [N][KINDS]
    answers: np.ndarray  # [N, KINDS] of ANSWERS
    truth: np.ndarray  # [N, KINDS, T, SIDE, SIDE] bool: the named objects, when it matters


def ask(scenes: Scenes) -> Questions:
    """Ask one question of every kind about each video."""
    n, _, frames = scenes.alive.shape
    rows = np.arange(n)
    first_colour = np.take_along_axis(scenes.colour, scenes.alive.argmax(2)[..., None], 2)[..., 0]
    glow = scenes.glows[:, GLOWING].argmax(1)
    one_first = scenes.alive[:, ONE].argmax(1) < scenes.alive[:, OTHER].argmax(1)
    last = uniforms(scenes.seed, scenes.index, 1, _STREAM_WORDS)[:, 0] < 0.5
    home = scenes.cell[rows, STANDING, scenes.alive[:, STANDING].argmax(1)]

    answers = np.stack(
        [
            first_colour[:, BY_SHAPE],
            scenes.shape[:, BY_COLOUR] + len(COLOURS),
            _region(home) + len(COLOURS) + len(SHAPES),
            scenes.direction[:, MOVING] + len(COLOURS) + len(SHAPES) + len(PLACES),
            scenes.colour[rows, GLOWING, glow],
            np.where(one_first ^ last, scenes.shape[:, ONE], scenes.shape[:, OTHER]) + len(COLOURS),
        ],
        1,
    )
    named = (BY_SHAPE, BY_COLOUR, STANDING, MOVING, GLOWING, ONE)
    words = []
    for i in range(n):
        line = []
        for template, m in zip(_TEMPLATES, named, strict=True):
            line.append(
                template.format(
                    shape=SHAPES[scenes.shape[i, m]],
                    colour=COLOURS[first_colour[i, m]],
                    which="last" if last[i] else "first",
                )
            )
        words.append(line)

    top = scenes.top()  # [N, T, CELLS]
    truth = np.stack([top == m for m in named], 1)
    truth[:, KINDS.index("order")] |= top == OTHER
    truth[:, KINDS.index("event")] &= scenes.glows[:, GLOWING, :, None]
    return Questions(words, answers, truth.reshape(n, len(KINDS), frames, SIDE, SIDE))


def labels(scenes: Scenes) -> np.ndarray:
    """`[N, T * CELLS, LABELS]` float32: how well each word fits what a token shows, where and when, from 0 to 1."""
    n, _, frames = scenes.alive.shape
    top = scenes.top()
    out = np.zeros((n, frames, CELLS, len(LABELS)), np.float32)
    i, t, cell = np.nonzero(top >= 0)
    m = top[i, t, cell]
    out[i, t, cell, scenes.colour[i, m, t]] = 1
    out[i, t, cell, len(COLOURS) + scenes.shape[i, m]] = 1
    out[i, t, cell, LABELS.index("glows")] = scenes.glows[i, m, t]
    out[i, t, cell, LABELS.index(DIRECTIONS[0]) + scenes.direction[i, m]] = scenes.moves[i, m]
    late = np.linspace(0, 1, frames)[:, None]
    out[..., LABELS.index("first")], out[..., LABELS.index("last")] = 1 - late, late
    cells = np.arange(CELLS)
    out[:, :, cells, LABELS.index(PLACES[0]) + _region(cells)] = 1
    return out.reshape(n, frames * CELLS, len(LABELS))


def _region(cell: np.ndarray) -> np.ndarray:
    """Which of PLACES a cell lies in."""
    return cell // SIDE // 2 * 3 + cell % SIDE // 2


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word of the world; every other word is `<unk>`."""
    words = {word for template in _TEMPLATES for word in template.split() if not word.startswith("{")}
    vocabulary = [*SPECIAL_TOKENS, "<unk>", *_CHAT_WORDS, *ANSWERS, *sorted(words | {"first", "last"})]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>", unk_token="<unk>"
    )
