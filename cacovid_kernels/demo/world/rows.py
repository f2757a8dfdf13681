"""The procedural world as a data set: every row a video of its own and one question about it."""

from __future__ import annotations

from collections.abc import Sequence

from cacovid_kernels.demo.world.questions import ANSWERS, KINDS, ask
from cacovid_kernels.demo.world.scenery import paint
from cacovid_kernels.demo.world.scenes import WorldConfig, draw
from cacovid_kernels.samples import Sample

POLICY_SEED = 3  # of the world: neither the model's training nor any evaluation draws from it
WORLD = "world"  # what a configuration calls this data set, and the frozen model that lives in it


class WorldRows:
    """Videos drawn from the procedural world when they are asked for; the kinds of questions take turns.

    Args:
        size: how many rows there are to be.
        seed: of the world.
        config: size of the world; the default one when absent.

    Example:
        >>> from cacovid_kernels.demo.world.rows import WorldRows
        >>> WorldRows(6)[0].frames.shape
        (8, 48, 48, 3)
    """

    def __init__(self, size: int = 1_000_000, seed: int = POLICY_SEED, config: WorldConfig | None = None) -> None:
        self.size, self.seed, self.config = size, seed, config or WorldConfig()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int, /) -> Sample:
        if not 0 <= i < self.size:
            raise IndexError(f"WorldRows: row {i} must be in [0, {self.size}).")
        return self.samples([i])[0]

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """The rows of these numbers, drawn together, which is quicker."""
        scenes = draw(self.seed, numbers, self.config)
        questions, frames = ask(scenes), paint(scenes)
        rows = []
        for place, i in enumerate(numbers):
            kind = i % len(KINDS)
            answer = ANSWERS[int(questions.answers[place, kind])]
            question = questions.words[place][kind]
            rows.append(Sample(f"{KINDS[kind]} {i} of world {self.seed}", frames[place], question, answer))
        return rows
