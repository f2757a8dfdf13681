"""The scorers of kvpress: with kvpress itself where it is installed, else by its interface."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

hf = pytest.importorskip("transformers")

NAME = "cacovid_kernels.integrations.kvpress"


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)


def stand_in():
    """The part of kvpress's interface that the adapter meets: hooks on attention, a scorer, and its own compaction."""
    module, utils = types.ModuleType("kvpress"), types.ModuleType("kvpress.utils")
    utils.compute_n_kept = lambda length, ratio: max(1, int(length * (1 - ratio)))

    @dataclasses.dataclass
    class ScorerPress:
        compression_ratio: float = 0.0

        def post_init_from_model(self, model):
            self.prepared_for = model

        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            raise NotImplementedError

        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
            count = utils.compute_n_kept(keys.shape[2], self.compression_ratio)
            best = scores.argsort(-1, descending=True)[..., :count, None]
            return tuple(torch.take_along_dim(x, best, 2) for x in (keys, values))

        def forward_hook(self, layer, args, kwargs, output):
            cached, hidden = kwargs["past_key_values"].layers[layer.layer_idx], kwargs["hidden_states"]
            if hidden.shape[1] > 1:
                cached.keys, cached.values = self.compress(layer, hidden, cached.keys, cached.values, None, kwargs)

        @contextlib.contextmanager
        def __call__(self, model):
            self.post_init_from_model(model)
            hooks = [
                layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
                for layer in model.model.layers
            ]
            yield
            for hook in hooks:
                hook.remove()

    class KnormPress(ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return -keys.norm(dim=-1)

    module.utils, module.ScorerPress, module.KnormPress = utils, ScorerPress, KnormPress
    return {"kvpress": module, "kvpress.utils": utils}


def package_or_skip():
    """kvpress itself, where it is installed and runs with the transformers beside it."""
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        pytest.skip(f"kvpress does not run with transformers {hf.__version__}: {error}")


@pytest.fixture(params=["stand-in", "kvpress"])
def kvpress(request, monkeypatch):
    if request.param == "stand-in":
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    else:
        package_or_skip()
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module("kvpress")
    sys.modules.pop(NAME, None)


@pytest.fixture
def repacked(kvpress):
    """The class, made on the package or its stand-in."""
    return importlib.import_module(NAME).RepackPress


def prefilled(model, press, ids):
    cache = hf.DynamicCache()
    with press(model):
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ratio, kept", [(0.5, 10), (0.9, 2), (0.99, 1), (0.0, 21)])
def test_a_press_keeps_what_its_scorer_alone_would_in_the_order_of_the_prompt(
    kvpress, repacked, llama, ids, ratio, kept
):
    full = hf.DynamicCache()
    llama(ids, past_key_values=full, use_cache=True)
    cache = prefilled(llama, repacked(kvpress.KnormPress(compression_ratio=ratio)), ids)
    alone = prefilled(llama, kvpress.KnormPress(compression_ratio=ratio), ids)
    for layer, theirs, whole in zip(cache.layers, alone.layers, full.layers, strict=True):
        assert layer.keys.shape == theirs.keys.shape == (2, 2, kept, 8)
        best = (-whole.keys.norm(dim=-1)).topk(kept).indices.sort(-1).values[..., None]
        for name in ("keys", "values"):
            wanted = torch.take_along_dim(getattr(whole, name), best, 2)
            torch.testing.assert_close(getattr(layer, name), wanted, atol=0, rtol=0)
            assert getattr(layer, name).untyped_storage().nbytes() == wanted.numel() * 4 or ratio == 0


def decoded(model, press, ids):
    """Logits of three steps on the cache that a press leaves, and its rows after the prefill."""
    torch.manual_seed(2)
    cache, length, logits = prefilled(model, press, ids), ids.shape[1], []
    rows = [torch.cat([layer.keys, layer.values], -1) for layer in cache.layers]
    for step in range(3):
        token, position = torch.full((2, 1), 5 + step), torch.full((2, 1), length + step)
        logits.append(model(token, past_key_values=cache, position_ids=position).logits)
    return torch.cat(logits), rows


def test_decoding_on_the_compacted_cache_equals_the_scorers_own(kvpress, repacked, llama, ids):
    alone, _ = decoded(llama, kvpress.KnormPress(compression_ratio=0.6), ids)
    through, _ = decoded(llama, repacked(kvpress.KnormPress(compression_ratio=0.6)), ids)
    torch.testing.assert_close(through, alone, atol=1e-5, rtol=0)


SCORERS = ("SnapKVPress", "TOVAPress", "KeyDiffPress", "ExpectedAttentionPress", "StreamingLLMPress", "LagKVPress")


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_scorers_of_kvpress(llama, scorer):
    press = getattr(package_or_skip(), scorer)
    repacked = importlib.import_module(NAME).RepackPress
    ids = torch.randint(0, 50, (2, 150), generator=torch.Generator().manual_seed(1))
    (alone, rows), (through, ours) = (decoded(llama, make(press(0.6)), ids) for make in (lambda x: x, repacked))
    torch.testing.assert_close(through, alone, atol=1e-5, rtol=0)
    for theirs, mine in zip(rows, ours, strict=True):
        assert {tuple(row) for row in mine.flatten(0, 2).tolist()} == {
            tuple(row) for row in theirs.flatten(0, 2).tolist()
        }
        assert mine.shape == theirs.shape


def test_the_pipeline_of_kvpress_takes_a_press(llama):
    kvpress = package_or_skip()
    tokenizers = pytest.importorskip("tokenizers")
    repacked = importlib.import_module(NAME).RepackPress
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w2")
    run = hf.pipeline("kv-press-text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    context, answers = " ".join(f"w{3 + 7 * i % 40}" for i in range(60)), []
    for press in (kvpress.KnormPress(0.7), repacked(kvpress.KnormPress(0.7))):
        answers.append(run(context, question="w5 w9", press=press, max_new_tokens=6)["answer"])
    assert answers[0] == answers[1]
    assert len(answers[1].split()) == 6


def test_a_press_is_a_scorer_for_wrappers(kvpress, repacked):
    inner = kvpress.KnormPress(compression_ratio=0.5)
    press = repacked(inner)
    assert isinstance(press, kvpress.ScorerPress)
    press.compression_ratio = 0.25
    assert (inner.compression_ratio, press.compression_ratio) == (0.25, 0.25)
    keys = torch.arange(12.0).view(1, 2, 3, 2)
    layer = SimpleNamespace(head_dim=2)
    torch.testing.assert_close(press.score(layer, None, keys, keys, None, {}), -keys.norm(dim=-1))


@pytest.mark.parametrize("method", ["compress", "forward_hook", "__call__"])
def test_what_does_more_than_score_is_refused_in_one_line(kvpress, repacked, method):
    own = type("OwnPress", (kvpress.KnormPress,), {method: lambda self, *args: None})
    with pytest.raises(TypeError, match=rf"RepackPress: OwnPress has {method} of its own, .* Use it as it is\.$"):
        repacked(own(0.5))


def test_what_is_no_scorer_is_refused_in_one_line(repacked):
    with pytest.raises(TypeError, match=r"RepackPress: float is no ScorerPress\. Pass a press with scores"):
        repacked(0.5)


def test_gradients_are_refused_in_one_line(kvpress, repacked, ids):
    model = tiny_llama().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"repack_kv: has no gradient, .* Call it under torch\.no_grad\(\)\."):
        prefilled(model, repacked(kvpress.KnormPress(0.5)), ids)


def test_the_documentation_runs(kvpress, ids):
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", text, flags=re.S)
    cache = hf.DynamicCache()
    exec(
        compile(block, "integrations.md", "exec"),
        {"model": tiny_llama().requires_grad_(True), "ids": ids, "cache": cache},
    )
    assert cache.layers[0].keys.shape[2] == 10


def test_without_kvpress_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(
        ImportError, match=r"needs kvpress \(.*\)\. Install it: pip install 'cacovid-kernels\[kvpress\]'"
    ):
        importlib.import_module(NAME)
