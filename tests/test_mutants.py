"""The lists of planted bugs fit the code: a change that moves a line has to move its bug."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]
CPP_TEST = "csrc/tests/test_cuda_{}.cpp"
LISTS = sorted((ROOT / "tests").glob("*/mutants/*.toml"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_bug_can_be_planted_in_one_place(path):
    mutants = tomllib.loads(path.read_text())["mutant"]
    assert len(mutants) >= 6
    assert max(Counter(mutant["name"] for mutant in mutants).values()) == 1
    for mutant in mutants:
        assert mutant["old"] != mutant["new"]
        assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant["name"]
        if "cuda" in path.parts:
            assert mutant.get("caught_by", "bits") in ("bits", "thread", "address")
            check = "tests/cuda/test_cuda_{}.py" if mutant.get("caught_by", "bits") == "bits" else CPP_TEST
            assert (ROOT / check.format(path.stem)).exists()
