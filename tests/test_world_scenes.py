"""The procedural world: a video is a function of its number, answers and truth follow from what is seen."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from cacovid_kernels.demo.world import questions, scenery
from cacovid_kernels.demo.world import scenes as world
from cacovid_kernels.demo.world.questions import ANSWERS, KINDS, PLACES
from cacovid_kernels.demo.world.scenes import COLOURS, DIRECTIONS, NAMED, SHAPES, SIDE, WorldConfig

SIZES = [WorldConfig(), WorldConfig(frames=11), WorldConfig(frames=16, clutter=40)]


@pytest.fixture(params=SIZES, ids=lambda config: f"{config.frames} frames")
def scenes(request):
    return world.draw(3, range(60), request.param)


def seen(scenes, n):
    """What a viewer of video n sees: per frame, row, column, colour, shape, glow."""
    top = scenes.top()[n]
    return [
        (t, *divmod(c, SIDE), COLOURS[scenes.colour[n, top[t, c], t]], SHAPES[scenes.shape[n, top[t, c]]],
         bool(scenes.glows[n, top[t, c], t]))
        for t, c in zip(*np.nonzero(top >= 0), strict=True)
    ]  # fmt: skip


def answer(question, sights):
    """The answer to a question from what is seen alone, and where and when it is seen."""
    words = question.split()
    named = [w for w in words if w in SHAPES or w in COLOURS]

    def find(*names):
        return [s for s in sights if all(name in (s[3], s[4]) for name in names)]

    if "glows" in words:
        found = [s for s in find(named[0]) if s[5]]
        return {s[3] for s in found}, found
    if "colour" in words:
        found = find(named[0])
        return {s[3] for s in found}, found
    if "comes" in words:
        found = find(named[0])
        return {min(found)[4] if "first" in words else max(found)[4]}, found
    if "shape" in words:
        found = find(named[0])
        return {s[4] for s in found}, found
    if words[0] == "where":
        found = find(*named)
        return {PLACES[s[1] // 2 * 3 + s[2] // 2] for s in found}, found
    found = find(named[0])
    steps = {(b[1] - a[1], b[2] - a[2]) for a, b in zip(found, found[1:], strict=False)}
    return {DIRECTIONS[[tuple(step) for step in world.STEPS].index(step)] for step in steps}, found


def test_answers_and_truth_follow_from_what_is_seen(scenes):
    asked = questions.ask(scenes)
    for n in range(len(scenes)):
        sights = seen(scenes, n)
        for kind, question in enumerate(asked.words[n]):
            answers, evidence = answer(question, sights)
            assert answers == {ANSWERS[asked.answers[n, kind]]}, (n, question)
            places = {(t, row, column) for t, row, column, *_ in evidence}
            assert places == set(zip(*(axis.tolist() for axis in np.nonzero(asked.truth[n, kind])), strict=True))


def test_named_objects_are_all_in_the_picture(scenes):
    top = scenes.top()
    for m in range(NAMED):
        alive = scenes.alive[:, m]
        n, t = np.nonzero(alive)
        assert (top[n, t, scenes.cell[n, m, t]] == m).all()
        assert (alive.sum(1) == (3 if m == world.MOVING else 4 if m == world.GLOWING else alive.sum(1))).all()
    assert (scenes.glows[:, world.GLOWING].sum(1) == 1).all()
    assert scenes.cell[scenes.alive].min() >= 0
    assert scenes.cell[scenes.alive].max() < SIDE * SIDE


def test_what_is_seen_is_what_is_painted(scenes):
    frames = scenery.paint(scenes)
    tiles = frames.reshape(*frames.shape[:2], SIDE, scenery.CELL, SIDE, scenery.CELL, 3).swapaxes(3, 4)
    top = scenes.top()
    for i, t, c in list(zip(*np.nonzero(top >= 0), strict=True))[::29]:
        m, tile = top[i, t, c], tiles[i, t, c // SIDE, c % SIDE].reshape(-1, 3)
        colours = np.unique(tile, axis=0)
        sprite = scenery.SPRITES[scenes.shape[i, m]]
        if scenes.moves[i, m]:  # a pixel ahead, and behind it a line along the edge
            down, right = world.STEPS[scenes.direction[i, m]]
            sprite = np.roll(sprite, (down, right), (0, 1))
            edge = (0 if down + right > 0 else -1) if down else slice(None)
            sprite[(edge, slice(None)) if down else (slice(None), 0 if right > 0 else -1)] = True
        sprite = sprite.reshape(-1)
        # Some colour fills exactly the shape, and of all colours of the world it is the right one.
        fits = [colour for colour in colours if ((tile == colour).all(1) == sprite).all()]
        assert fits, (i, t, c)
        brightness = fits[0].astype(float) @ scenery.RGB.T / (scenery.RGB**2).sum(1)
        distance = np.abs(fits[0] - brightness[:, None] * scenery.RGB).max(1)
        assert distance.argmin() == scenes.colour[i, m, t]
        assert scenes.glows[i, m, t] == (tile == scenery.GLOW).all(1).any()


def test_a_video_is_a_function_of_its_number():
    one = world.draw(5, range(40))
    two = world.draw(5, [17, 3])
    for field in fields(one):
        if field.name != "seed":
            assert (getattr(one, field.name)[[17, 3]] == getattr(two, field.name)).all(), field.name
    assert (scenery.paint(one)[[17, 3]] == scenery.paint(two)).all()
    assert (questions.ask(one).answers[[17, 3]] == questions.ask(two).answers).all()
    assert (scenery.paint(world.draw(6, [17])) != scenery.paint(two)[:1]).any()
    assert len({frames.tobytes() for frames in scenery.paint(one)}) == 40


def test_answers_are_spread_evenly():
    answers = questions.ask(world.draw(1, range(3000))).answers
    for kind, name in enumerate(KINDS):
        counts = np.unique(answers[:, kind], return_counts=True)[1]
        assert len(counts) == {"place": 9, "direction": 4}.get(name, 8)
        assert counts.max() / counts.min() < 1.6, name


def test_the_light_says_when(scenes):
    frames = scenery.paint(scenes).astype(float)
    empty = (scenes.top() < 0) & ~scenes.flicker
    red_less_blue = frames.reshape(*frames.shape[:2], SIDE, scenery.CELL, SIDE, scenery.CELL, 3).mean((3, 5))
    warmth = (red_less_blue[..., 0] - red_less_blue[..., 2]).reshape(empty.shape)
    means = [warmth[:, t][empty[:, t]].mean() for t in range(empty.shape[1])]
    assert np.all(np.diff(means) < -5)


def test_labels_name_what_each_token_shows(scenes):
    labels = questions.labels(scenes).reshape(len(scenes), -1, SIDE, SIDE, len(questions.LABELS))
    early, late = (labels[..., questions.LABELS.index(word)] for word in ("first", "last"))
    assert np.allclose(late, np.linspace(0, 1, labels.shape[1])[:, None, None])
    assert np.allclose(early, 1 - late)
    labels[..., -2:] = 0
    top = scenes.top()
    for n in range(5):
        expected = {(t, row, column): {colour, shape} | ({"glows"} if glows else set())
                    for t, row, column, colour, shape, glows in seen(scenes, n)}  # fmt: skip
        for place in np.ndindex(labels.shape[1:4]):
            words = {word for word, said in zip(questions.LABELS, labels[(n, *place)], strict=True) if said}
            t, row, column = place
            m = top[n, t, row * SIDE + column]
            moving = {DIRECTIONS[scenes.direction[n, m]]} if m >= 0 and scenes.moves[n, m] else set()
            assert words == expected.get(place, set()) | moving | {PLACES[row // 2 * 3 + column // 2]}


def test_tokenizer_has_one_token_per_word():
    tokenizer = questions.word_tokenizer()
    for line in questions.ask(world.draw(2, range(50))).words:
        for question in line:
            ids = tokenizer(question)["input_ids"]
            assert len(ids) == len(question.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == question
    assert tokenizer("what colour is the zebra")["input_ids"][-1] == tokenizer.unk_token_id


def test_frames_out_of_range():
    with pytest.raises(ValueError, match=r"frames=7 must be in \[8, 16\]"):
        WorldConfig(frames=7)
