"""The demo runs, proves and draws a model of every Hugging Face family."""

from __future__ import annotations

import json

import hf_models as hf
import pytest

pytest.importorskip("av")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

from clips import encode  # noqa: E402
from hf_played import Played  # noqa: E402

from cacovid_kernels.demo import files, pipeline  # noqa: E402
from cacovid_kernels.demo.report import Progress, notes  # noqa: E402


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("video") / "grey.mp4", frames=12)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_compressed_run_equals_the_masked_full_run(family, video, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_model", lambda name: Played(family))
    options = pipeline.Options(
        video=video, question="0", model="played", num_frames=4, keep_ratio=0.5, max_new_tokens=5, repeats=1
    )
    result = pipeline.run(options, tmp_path, Progress())
    assert result.agreement.holds
    assert result.agreement.largest < 1e-5
    assert result.agreement.renumbered > 100 * result.agreement.largest
    kept, tokens = sum(result.selection.lengths), result.selection.num_tokens
    assert kept == tokens // 2
    assert result.prompt_tokens["full"] - result.prompt_tokens["compressed"] == tokens - kept
    assert [len(said) for said in result.generated.values()] == [5, 5]
    assert any(line.startswith("answer, compressed prompt") for line in notes(result))

    files.write_picture(result, tmp_path / "kept_tokens.png")
    files.write_page(result, tmp_path / "report.html")
    files.write_json(result, tmp_path / "selection.json")
    record = json.loads((tmp_path / "selection.json").read_text())
    assert len(record["kept"]) == record["grid_thw"][0]
    assert Image.open(tmp_path / "kept_tokens.png").width > 100
