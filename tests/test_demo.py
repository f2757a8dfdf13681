"""The demo from a video file to its results."""

from __future__ import annotations

import json

import pytest
import torch

np = pytest.importorskip("numpy")
av = pytest.importorskip("av")
pytest.importorskip("transformers")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

from clips import encode  # noqa: E402

from cacovid_kernels.demo import command, files, pipeline  # noqa: E402
from cacovid_kernels.demo.meter import Meter  # noqa: E402
from cacovid_kernels.demo.oracle import compare  # noqa: E402
from cacovid_kernels.demo.render import render_clip  # noqa: E402
from cacovid_kernels.demo.report import Progress, notes, table  # noqa: E402
from cacovid_kernels.errors import UserError  # noqa: E402
from cacovid_kernels.integrations.transformers.prompt import read  # noqa: E402
from cacovid_kernels.integrations.transformers.registry import adapter_of  # noqa: E402
from cacovid_kernels.video import read_clip  # noqa: E402
from cacovid_kernels.video_models import TinyGeometry, load_model, tiny_model  # noqa: E402

SMALL = TinyGeometry(image_size=112, vision_width=32, vision_layers=1, width=64, layers=2)  # 4 x 4 tokens a frame


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("video") / "grey.mp4")


@pytest.fixture(scope="module")
def result(video, tmp_path_factory):
    options = pipeline.Options(video=video, keep_ratio=0.25, num_frames=8, max_new_tokens=5, geometry=SMALL)
    return pipeline.run(options, tmp_path_factory.mktemp("run"), Progress())


def test_rendered_clip_is_reproducible_and_readable(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        render_clip(tmp_path / name, seconds=0.5, seed=3)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert read_clip(tmp_path / "a.mp4", 32).frames.shape == (12, 360, 640, 3)


def test_the_compressed_run_equals_the_masked_full_run(result):
    assert result.agreement.holds
    assert result.agreement.largest < 1e-5
    assert result.agreement.renumbered > 100 * result.agreement.largest
    assert result.selection.lengths == (32,)
    assert result.prompt_tokens["full"] - result.prompt_tokens["compressed"] == 8 * 16 - 32
    assert len(result.generated["compressed"]) == 5
    assert all(cost.ms > 0 for cost in result.costs.values())


@torch.inference_mode()
def test_prompt_is_the_one_hugging_face_builds(result):
    model = result.model
    inputs = model.inputs(result.clip.frames, "why?")
    whole = read(model.network, adapter_of(model.network), inputs)
    expected = model.network(**inputs).logits
    assert (model.network(inputs_embeds=whole.inputs_embeds).logits - expected).abs().max() < 1e-5


def test_keeping_everything_changes_nothing(video, tmp_path):
    options = pipeline.Options(video=video, keep_ratio=1.0, num_frames=4, max_new_tokens=4, repeats=1, geometry=SMALL)
    result = pipeline.run(options, tmp_path, Progress())
    assert result.prompt_tokens["full"] == result.prompt_tokens["compressed"]
    assert torch.equal(result.generated["full"], result.generated["compressed"])


def test_the_comparison_notices_a_wrong_run(result):
    """Other logits than those of the run, and another choice of tokens than the run's."""
    network, generated = result.model.network, result.generated["compressed"]
    adapter, inputs = adapter_of(network), result.model.inputs(result.clip.frames, result.scene.question)
    with torch.inference_mode():
        prompt = read(network, adapter, inputs)
    zeros = torch.zeros(len(generated), network.config.get_text_config().vocab_size)
    rest = (network, adapter, inputs, prompt, result.selection.indices, generated)
    wrong = compare(*rest, zeros)
    assert not wrong.holds
    assert wrong.kept_positions < 1e-5


def test_any_question_has_tokens_and_placeholders_are_refused(result):
    ids = result.model.prompt("été \U0001f3ac?", 1)
    assert "été \U0001f3ac?" in result.model.tokenizer.decode(ids[0])
    with pytest.raises(UserError, match="must not contain <video>"):
        result.model.prompt("what is <video>?", 1)


def test_pixels_follow_the_published_processing(result):
    frames = np.full((1, 20, 30, 3), 255, np.uint8)
    expected = [(1 - m) / s for m, s in zip(result.model.mean, result.model.std, strict=True)]
    pixels = result.model.pixels(frames)
    assert pixels.shape == (1, 3, 112, 112)
    assert pixels.amax((0, 2, 3)).tolist() == pytest.approx(expected)
    assert pixels.amin((0, 2, 3)).tolist() == pytest.approx(expected)


def test_reports_say_what_was_found(result, tmp_path):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result))
    page = console.export_text()
    for word in (
        "video tokens",
        "128",
        "32",
        "KV cache",
        "vision tower",
        "score",
        "select",
        "gather",
        "prefill",
    ):
        assert word in page
    text = "\n".join(notes(result))
    assert "check: right" in text
    assert "random" in text

    files.write_json(result, tmp_path / "selection.json")
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["grid_thw"] == [8, 4, 4]
    assert [len(kept) for kept in record["kept"]] == record["frame_counts"]
    flat = [i * 16 + j for i, kept in enumerate(record["kept"]) for j in kept]
    assert flat == result.selection.indices.tolist()
    assert record["video"]["name"] == "grey.mp4"
    files.write_picture(result, tmp_path / "kept_tokens.png")
    assert Image.open(tmp_path / "kept_tokens.png").mode == "RGB"
    files.write_page(result, tmp_path / "report.html")
    assert "<title>Kept video tokens of grey.mp4</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_short_video_is_said_to_be_short(video, tmp_path):
    few = encode(tmp_path / "few.mp4", frames=3)
    options = pipeline.Options(video=few, num_frames=8, max_new_tokens=2, keep_ratio=0.5, repeats=1, geometry=SMALL)
    result = pipeline.run(options, tmp_path, Progress())
    assert any("3 instead of 8" in line for line in notes(result))


def test_model_and_policy_folders(video, tmp_path):
    folder, policy = tmp_path / "model", tmp_path / "policy"
    tiny = tiny_model(SMALL, seed=1)
    tiny.network.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    loaded = load_model(str(folder))
    assert loaded.mean == (0.5, 0.5, 0.5)

    pipeline._policy(pipeline.Options(video=video), tiny.network).save_pretrained(policy)
    options = pipeline.Options(
        video=video, model=str(folder), policy=policy, num_frames=4, max_new_tokens=3, keep_ratio=0.25
    )
    result = pipeline.run(options, tmp_path, Progress())
    assert result.agreement.holds
    assert any(line.startswith("answer, compressed prompt") for line in notes(result))

    for broken, message in (
        (pipeline.Options(video=video, model=str(tmp_path / "none")), "model: .* cannot be loaded"),
        (
            pipeline.Options(video=video, geometry=SMALL, policy=tmp_path / "none"),
            "policy: .* cannot be loaded",
        ),
        (pipeline.Options(video=video, policy=policy), "hidden_size=64, the model 256"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            pipeline.run(broken, tmp_path, Progress())
        assert "\n" not in str(caught.value)


def test_other_kinds_of_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match=r"model: .* cannot be loaded") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_served_is_one_line(video, tmp_path, monkeypatch):
    class Refusing:
        network = tiny_model(SMALL).network

        def inputs(self, *_):
            raise ValueError("height 8 must be larger than 28\nmore")

    monkeypatch.setattr(pipeline, "load_model", lambda name: Refusing())
    with pytest.raises(UserError, match=r"^model: height 8 must be larger than 28$"):
        pipeline.run(pipeline.Options(video=video, model="any"), tmp_path, Progress())
    Refusing.network.config.text_config.layer_types = ["sliding_attention"]
    with pytest.raises(UserError, match=r"^model: .*sliding_attention"):
        pipeline.run(pipeline.Options(video=video, model="any"), tmp_path, Progress())


def test_outputs_appear_together_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), files.staged(out) as folder:  # noqa: PT012
        (folder / "one").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.staged(out) as folder:
        (folder / "one").write_text("1")
        assert not out.exists()
    assert [file.name for file in out.iterdir()] == ["one"]

    (out / "two").mkdir()
    with pytest.raises(UserError, match="a file goes there"), files.staged(out) as folder:  # noqa: PT012
        (folder / "one").write_text("changed")
        (folder / "two").write_text("2")
    assert (out / "one").read_text() == "1"
    assert sorted(file.name for file in out.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("out", ["/proc/none", "/dev/null", "/dev/null/none"])
def test_places_that_cannot_be_written(out):
    from pathlib import Path

    with pytest.raises(UserError, match=r"^--out: "), files.staged(Path(out)):
        pytest.fail("the block must not run")


def test_meter_sees_time_and_memory():
    meter = Meter(torch.device("cpu"))
    with meter.stage("run", "allocate"):
        torch.ones(8 << 20)
    cost = meter.costs["run", "allocate"]
    assert cost.ms > 0
    if cost.peak_mib is not None:
        assert 28 < cost.peak_mib < 64


def test_wrong_result_is_an_exit_code(result, tmp_path, monkeypatch, capsys):
    import dataclasses

    wrong = dataclasses.replace(result.agreement, generated=1.0)
    monkeypatch.setattr(command, "run", lambda *_: dataclasses.replace(result, agreement=wrong))
    from cacovid_kernels.cli import main

    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "WRONG" in capsys.readouterr().out
