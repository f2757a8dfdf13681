"""The page of a selection as text: what it holds, what it refers to, what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch

import cacovid_kernels as ck

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from cacovid_kernels.viz import report  # noqa: E402

GRID = (4, 3, 5)


def example(**change):
    rng = np.random.default_rng(0)
    given = {
        "frames": rng.integers(0, 256, (4, 30, 50, 3), dtype=np.uint8),
        "selection": rng.random(GRID) < 0.3,
        "scores": rng.normal(size=GRID),
    }
    return {**given, **change}


def record_of(page):
    return json.loads(re.search(r'<script type="application/json" id="record">(.*?)</script>', page, re.S)[1])


def mask_of(packed):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), bitorder="little", count=np.prod(GRID))
    return bits.astype(bool).reshape(GRID)


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB"))


def test_the_record_holds_the_arguments():
    given = example(timestamps=[0, 0.5, 1.25, 2], question="why?", answers={"full": "so", "compressed": "thus"})
    record = record_of(report(**given))
    assert record["grid"] == list(GRID)
    assert record["timestamps"] == [0, 0.5, 1.25, 2]
    assert record["answers"] == [["full", "so"], ["compressed", "thus"]]
    assert (mask_of(record["selections"][0]) == given["selection"]).all()
    scores = np.frombuffer(base64.b64decode(record["scores"]), "<f4")
    assert (scores == given["scores"].astype(np.float32).ravel()).all()
    assert [pixels_of(heat).shape for heat in record["heat"]] == [(3, 5, 3)] * 4
    for uri, frame in zip(record["frames"], given["frames"], strict=True):
        assert (pixels_of(uri) == frame).all()


def test_selections_of_every_kind_are_the_same_page():
    torch.manual_seed(0)
    scores = torch.randn(4, 15)
    frames = torch.randint(0, 256, (4, 20, 20, 3), dtype=torch.uint8)
    selection = ck.topk_tokens(scores, [GRID], keep_ratio=0.5)
    page = report(frames, selection, scores)
    assert page == report(frames, selection.mask(), scores.numpy(), GRID)
    assert page == report(frames.numpy(), [selection.mask().reshape(GRID)], scores)
    other = ck.topk_tokens(scores, [GRID], keep_ratio=0.2)
    record = record_of(report(frames, [selection, other]))
    assert [int(mask_of(packed).sum()) for packed in record["selections"]] == [30, 12]
    assert record["scores"] is None


def test_texts_cannot_become_markup():
    texts = ["</script><script>alert(1)</script>", "\"'&<!--<img src=x onerror=alert(1)>\u2028", "{{record}}"]
    page = report(**example(), title=texts[0], question=texts[1], answers={texts[2]: texts[0]})
    assert page.count("<script") == page.count("</script>") == 2
    assert "onerror" not in page.replace("\\u003cimg src=x onerror", "")
    assert "<title>&lt;/script&gt;" in page
    record = record_of(page)
    assert record["question"] == texts[1]
    assert record["answers"] == [[texts[2], texts[0]]]


def test_the_page_stands_alone():
    page = report(**example())
    assert page.startswith("<!doctype html>")
    assert "{{" not in page
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bfetch\(|XMLHttp", page)
    assert "default-src 'none'; img-src data:;" in page


def test_a_long_video_stays_below_five_megabytes():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (128, 190, 185, 3), dtype=np.uint8)  # noise, hardly made smaller: the worst case
    scores = rng.normal(size=(128, 14, 14))
    page = report(frames, scores > 1, scores)
    assert len(page.encode()) < 5e6


def test_odd_scores_and_empty_selections():
    for value in (float("nan"), float("-inf"), float("inf"), 1e300, 0.0):
        page = report(**example(selection=np.zeros(GRID, bool), scores=np.full(GRID, value)))
        assert len(record_of(page)["frames"]) == 4


@pytest.mark.parametrize("size", [(1, 1), (7, 900), (2000, 3), (600, 800)])
def test_frames_of_any_shape(size):
    record = record_of(report(np.full((1, *size, 3), 99, np.uint8), np.ones((1, 2, 2), bool)))
    assert record["size"] == [size[1], size[0]]
    picture = pixels_of(record["frames"][0])
    assert picture.shape[1] <= 640
    assert np.abs(picture - 99.0).max() <= 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"frames": np.zeros((3, 8, 8, 3), np.uint8)}, ValueError, r"frames must be \[4, H, W, 3\] uint8"),
        ({"frames": np.zeros((4, 0, 8, 3), np.uint8)}, ValueError, r"frames must be \[4, H, W, 3\] uint8"),
        ({"selection": np.zeros(7, bool), "grid": GRID}, ValueError, "selection holds 7 tokens"),
        ({"selection": np.zeros(60, bool)}, ValueError, "grid must be"),
        ({"selection": []}, ValueError, "selection is an empty list"),
        ({"selection": [np.zeros(GRID, bool), np.zeros((4, 5, 3), bool)]}, ValueError, "selection 1 has grid"),
        ({"scores": np.zeros(7)}, ValueError, "scores hold 7 tokens"),
        ({"timestamps": [0.0]}, ValueError, "timestamps has 1 entries"),
        ({"timestamps": [0.0, 1.0, float("nan"), 2.0]}, ValueError, "timestamps must be finite"),
        ({"answers": "left"}, TypeError, "answers must map"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, error, message):
    with pytest.raises(error, match=message) as caught:
        report(**example(**change))
    assert str(caught.value).startswith("report: ")
    assert "\n" not in str(caught.value)
