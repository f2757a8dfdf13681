"""The model of lmms-eval: with the harness itself where it is installed, else by its interface."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels.compressors import divprune, evs

hf = pytest.importorskip("transformers")
av = pytest.importorskip("av")
pytest.importorskip("accelerate")
hf_models = pytest.importorskip("hf_models", reason="the families need a newer transformers")

from cacovid_kernels.integrations.lmms_eval.messages import read  # noqa: E402
from cacovid_kernels.integrations.transformers import compress  # noqa: E402

NAME = "cacovid_kernels.integrations.lmms_eval.model"
FRAMES = 4
PER_VIDEO = FRAMES * 4 + 1  # a newline behind the tokens


class Processor:
    """Lays prompts out as LLaVA-OneVision's does, for frames of 16 x 16."""

    def __init__(self):
        self.tokenizer = SimpleNamespace(pad_token_id=hf_models.PAD, padding_side="right")
        self.options = []

    def apply_chat_template(self, batch, *, processor_kwargs, **how):
        wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        assert how == wanted
        self.options.append(processor_kwargs)
        rows, videos = [], []
        for messages in batch:
            row = [3]
            for item in (item for message in messages for item in message["content"]):
                if item["type"] == "video":
                    videos.append(torch.from_numpy(item["video"]).permute(0, 3, 1, 2) / 127.5 - 1)
                    row += [hf_models.VIDEO] * PER_VIDEO
                else:
                    row += [10 + ord(letter) % 100 for letter in item["text"]]
            rows.append(row)
        longest = max(map(len, rows))
        pads = [[hf_models.PAD] * (longest - len(row)) for row in rows]
        assert self.tokenizer.padding_side == "left"
        inputs = {
            "input_ids": torch.tensor([pad + row for pad, row in zip(pads, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * len(p) + [1] * len(r) for p, r in zip(pads, rows, strict=True)]),
        }
        return hf.BatchFeature(inputs | ({"pixel_values_videos": torch.stack(videos)} if videos else {}))

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) for row in ids.tolist()]


def stand_in():
    """The part of the harness's interface that the model meets."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model", "lmms_eval.models")
    modules = {name: types.ModuleType(name) for name in (*names, "lmms_eval.models.registry_v2")}

    class lmms:  # noqa: N801
        is_simple = True

        def __init__(self):
            self.rank, self.task_dict = 0, {}
            self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)

    instance = modules["lmms_eval.api.instance"]
    instance.TokenCounts = dataclasses.make_dataclass("TokenCounts", ["input_tokens", "output_tokens"])
    instance.GenerationResult = dataclasses.make_dataclass("GenerationResult", ["text", "token_counts"])
    modules["lmms_eval.api.model"].lmms = lmms
    manifest = dataclasses.make_dataclass("ModelManifest", ["model_id", "chat_class_path"])
    modules["lmms_eval.models.registry_v2"].ModelManifest = manifest
    return modules


def harness_installed():
    try:
        return importlib.util.find_spec("lmms_eval.api.model") is not None
    except ImportError:
        return False


@pytest.fixture(params=["stand-in", "lmms-eval"])
def module(request, monkeypatch):
    if request.param == "lmms-eval":
        if not harness_installed():
            pytest.skip("lmms-eval is not installed")
    else:
        for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    processor = Processor()
    monkeypatch.setattr(module, "AutoProcessor", SimpleNamespace(from_pretrained=lambda name: processor))
    yield module
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_models.tiny("llava_onevision").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """Two questions about videos of 8 frames, one without a video."""
    path, out = tmp_path_factory.mktemp("videos"), []
    random = np.random.default_rng(0)
    for number, question in enumerate(("what", "who is it")):
        file = str(path / f"{number}.mp4")
        with av.open(file, "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 16
            for _ in range(8):
                picture = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        out.append({"video": file, "question": question, "answer": "no"})
    return [*out, {"video": None, "question": "why", "answer": "no"}]


def messages_of(doc):
    video = [{"type": "video", "url": doc["video"]}] if doc["video"] else []
    return [{"role": "user", "content": [*video, {"type": "text", "text": doc["question"]}]}]


def asked(model, docs, settings=({"max_new_tokens": 5},)):
    """The answers of a model to all documents, as the harness asks for them."""
    model.task_dict = {"t": {"test": docs}}
    requests = [
        SimpleNamespace(args=(doc["question"], messages_of, settings[i % len(settings)], i, "t", "test"))
        for i, doc in enumerate(docs)
    ]
    return model.generate_until(requests)


def directly(model, doc, selector, count=5, **budget):
    """The answer of `compress` to one document."""
    batch = read([messages_of(doc)], FRAMES).messages
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = model.processor.apply_chat_template(batch, processor_kwargs={}, **how)
    with compress(model.model, selector, **budget):
        ids = model.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return model.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_are_those_of_compress_in_the_order_of_the_requests(module, folder, docs, batch_size):
    model = module.Cacovid(str(folder), keep_ratio=0.25, max_num_frames=FRAMES, batch_size=batch_size, device="cpu")
    answers = asked(model, docs, ({"max_new_tokens": 5}, {"max_new_tokens": 3, "temperature": 0, "until": ["\n"]}))
    wanted = [directly(model, doc, divprune, (5, 3, 5)[i], keep_ratio=0.25) for i, doc in enumerate(docs)]
    assert [answer.text for answer in answers] == wanted
    counts = [(answer.token_counts.input_tokens, answer.token_counts.output_tokens) for answer in answers]
    kept = 4 + 1  # of 16, and the newline
    assert counts == [(1 + kept + 4, 5), (1 + kept + 9, 3), (1 + 3, 5)]
    video = model.processor.options[0]["video_metadata"][0]
    assert video == {"total_num_frames": 2000, "fps": 1000.0, "duration": 2.0, "frames_indices": [0, 500, 1250, 1750]}
    assert "generate" not in vars(model.model)


def test_selectors_and_policies_reach_compress(module, folder, docs, tmp_path):
    torch.manual_seed(5)
    policy = ck.CompressionPolicy(ck.PolicyConfig(32, 64, 4, 2)).eval()
    policy.save_pretrained(tmp_path)
    for arguments, selector, budget in (
        ({"selector": "evs", "num_tokens": 3}, evs, {"num_tokens": 3}),
        ({"policy": str(tmp_path), "keep_ratio": 0.5}, policy, {"keep_ratio": 0.5}),
        (
            {"policy": str(tmp_path), "keep_ratio": 0.25, "budget": "video"},
            policy,
            {"keep_ratio": 0.25, "budget": "video"},
        ),
    ):
        model = module.Cacovid(str(folder), max_num_frames=FRAMES, device="cpu", **arguments)
        answers = asked(model, docs[:2])
        assert [answer.text for answer in answers] == [directly(model, doc, selector, **budget) for doc in docs[:2]]


@pytest.mark.parametrize(
    "arguments, line",
    [
        ({"keep_ration": 0.1}, "cacovid: unknown argument keep_ration; the arguments are ['pretrained', 'keep_ratio'"),
        ({"selector": "fastv", "keep_ratio": 0.1}, "cacovid: selector=fastv, it must be one of ['divprune', 'evs'"),
        ({"selector": "evs", "policy": "p", "keep_ratio": 0.1}, "cacovid: selector=evs and policy=p are both given."),
        ({"keep_ratio": 0.1, "batch_size": "auto"}, "cacovid: batch_size=auto, it must be a whole number >= 1."),
        ({"keep_ratio": 0.1, "max_num_frames": 0}, "cacovid: max_num_frames=0, it must be a whole number >= 1."),
        ({"keep_ratio": 0.1, "budget": "video"}, "this selector takes no budget"),
        ({"keep_ratio": 2.0}, "keep_ratio"),
        ({}, "keep_ratio"),
        ({"pretrained": None, "keep_ratio": 0.1}, "cacovid: pretrained is missing."),
    ],
)
def test_bad_arguments_get_one_line(module, arguments, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        module.Cacovid(**{"pretrained": "nowhere", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "item, line",
    [
        ({"type": "audio", "url": "a.wav"}, "cacovid: a message holds audio."),
        ({"type": "video", "url": [1, 2]}, "cacovid: a video is a list."),
        ({"type": "video", "url": "v.mp4", "start_time": 1.0}, "cacovid: v.mp4 is to be cut in time."),
    ],
)
def test_messages_that_cannot_be_served_get_one_line(item, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        read([[{"role": "user", "content": [item]}]], FRAMES)


def test_the_entry_point_names_the_model(module):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    table = project.split('[project.entry-points."lmms_eval.models"]\n')[1].split("\n\n")[0]
    target, function = re.fullmatch(r"cacovid = \"(.*):(.*)\"", table).groups()
    manifest = getattr(importlib.import_module(target), function)()
    assert (manifest.model_id, manifest.chat_class_path) == ("cacovid", f"{NAME}.Cacovid")
    assert module.__name__ == NAME


def test_the_entry_point_imports_nothing_that_other_models_could_lack(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cacovid_kernels.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "accelerate", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    assert importlib.import_module(NAME.rsplit(".", 1)[0]).manifest().model_id == "cacovid"


def test_without_lmms_eval_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"needs lmms-eval \(.*\)\. .*pip install 'cacovid-kernels\[lmms-eval\]'"):
        importlib.import_module(NAME)
