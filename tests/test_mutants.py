"""The lists of planted bugs fit the code: a change that moves a line has to move its bug."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]
LISTS = sorted((ROOT / "tests" / "triton" / "mutants").glob("*.toml"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_bug_can_be_planted_in_one_place(path):
    mutants = tomllib.loads(path.read_text())["mutant"]
    assert len(mutants) >= 6
    assert max(Counter(mutant["name"] for mutant in mutants).values()) == 1
    for mutant in mutants:
        assert mutant["old"] != mutant["new"]
        assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant["name"]
