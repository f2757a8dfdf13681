"""The contact sheet of a selection."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")

from cacovid_kernels.viz import heat_colours, plot_selection  # noqa: E402


@pytest.mark.parametrize(
    "grid, size", [((1, 1, 1), (4, 4)), ((3, 14, 14), (90, 160)), ((9, 2, 7), (301, 33)), ((2, 5, 5), (1, 1))]
)
@pytest.mark.parametrize("columns", [1, 8])
def test_edge_sizes(grid, size, columns):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (grid[0], *size, 3), dtype=np.uint8)
    picture = plot_selection(frames, rng.random(grid) < 0.3, rng.random(grid), columns=columns)
    assert picture.mode == "RGB"
    assert min(picture.size) > 100


def test_kept_cells_are_bright_and_dropped_ones_dim():
    frames = np.full((1, 100, 200, 3), 200, np.uint8)
    mask = np.zeros((1, 2, 2), bool)
    mask[0, 0, 1] = True
    page = np.asarray(plot_selection(frames, mask)).astype(int)
    bright = (page == 200).all(-1)
    rows, columns = np.nonzero(bright)
    cell = (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
    assert cell == (49, 98)  # a quarter of a 196 x 98 frame
    assert bright.sum() == cell[0] * cell[1]


def test_selection_object_and_tensors():
    torch.manual_seed(0)
    scores = torch.randn(4, 9)
    selection = ck.select_tokens(scores, None, [(4, 3, 3)], keep_ratio=0.5)
    frames = torch.randint(0, 256, (4, 30, 40, 3), dtype=torch.uint8)
    one = plot_selection(frames, selection, scores, timestamps=[0, 1, 2, 3])
    two = plot_selection(frames, selection.mask(), scores.bfloat16().float(), (4, 3, 3), timestamps=[0, 1, 2, 3])
    assert one.size == two.size


def test_odd_scores_and_empty_selection():
    frames = np.zeros((2, 20, 20, 3), np.uint8)
    for value in (float("nan"), float("-inf"), 0.0):
        plot_selection(frames, np.zeros((2, 2, 2), bool), np.full((2, 2, 2), value))
    assert heat_colours(np.array([0.0, 1.0, np.nan, 2.0])).tolist()[2] == [128, 128, 128]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": np.zeros((3, 8, 8, 3), np.uint8)}, "frames must be"),
        ({"frames": np.zeros((2, 8, 8, 3), np.float32)}, "frames must be"),
        ({"selection": np.zeros(7, bool)}, "selection holds 7 tokens"),
        ({"scores": np.zeros(7)}, "scores hold 7 tokens"),
        ({"timestamps": [0.0]}, "timestamps has 1 entries"),
        ({"grid": None, "selection": np.zeros(8, bool)}, "grid must be"),
    ],
)
def test_shapes_that_disagree(change, message):
    good = {"frames": np.zeros((2, 8, 8, 3), np.uint8), "selection": np.zeros(8, bool), "grid": (2, 2, 2)}
    with pytest.raises(ValueError, match=message):
        plot_selection(**{**good, **change})


def test_several_videos_are_refused():
    selection = ck.select_tokens(torch.randn(18), None, [(1, 3, 3), (1, 3, 3)], keep_ratio=0.5)
    with pytest.raises(ValueError, match="2 videos"):
        plot_selection(np.zeros((2, 8, 8, 3), np.uint8), selection)
