"""repack_kv on Hugging Face caches: decoding after it equals decoding with everything else masked."""

from __future__ import annotations

import copy

import pytest
import torch

import cacovid_kernels as ck

transformers = pytest.importorskip("transformers")

PROMPT, LAYERS = 30, 3
KEEP = torch.tensor([0, 1, 2, 5, 7, 8, 13, 20, 21, 28, 29])


def tiny(family):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "attn_implementation": "sdpa"}
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return tiny(request.param)


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def prefill(model, ids, cache=None):
    cache = transformers.DynamicCache() if cache is None else cache
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def decode(model, cache, first_position, mask=None, steps=4):
    """Logits of a few fixed tokens fed one by one."""
    logits = []
    for step in range(steps):
        position = torch.full((2, 1), first_position + step)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(2, 1)], 1)
        token = torch.full((2, 1), 7 + step)
        with torch.no_grad():
            out = model(token, past_key_values=cache, attention_mask=mask, position_ids=position, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def masked(keep):
    mask = torch.zeros(2, PROMPT, dtype=torch.int64)
    return mask.scatter(1, keep.expand(2, -1), 1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("keep", [KEEP, torch.stack([KEEP, KEEP - (KEEP > 10).long()])], ids=["shared", "per row"])
def test_decoding_equals_a_masked_full_cache(model, ids, keep, inplace):
    full = prefill(model, ids)
    cache = copy.deepcopy(full)
    result = ck.repack_kv(cache, keep, inplace=inplace)
    assert (result is cache) == inplace
    assert type(result) is transformers.DynamicCache
    assert result.get_seq_length() == keep.shape[-1]
    assert cache.get_seq_length() == (keep.shape[-1] if inplace else PROMPT)
    wanted = decode(model, full, PROMPT, masked(keep))
    torch.testing.assert_close(decode(model, result, PROMPT), wanted, atol=1e-5, rtol=0)
    assert result.get_seq_length() == keep.shape[-1] + 4


def test_padded_rows_are_masked(model, ids):
    keep = torch.stack([KEEP, torch.cat([KEEP[:8], torch.full((3,), -1)])])
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 8:] = 0
    full = prefill(model, ids)
    result = ck.repack_kv(full, keep)
    dropped = torch.zeros(2, PROMPT, dtype=torch.int64)
    dropped[0, KEEP] = dropped[1, KEEP[:8]] = 1
    wanted = decode(model, full, PROMPT, dropped)
    torch.testing.assert_close(decode(model, result, PROMPT, mask), wanted, atol=1e-5, rtol=0)


def test_keys_turned_to_new_positions_decode_as_a_shorter_prompt(model, ids):
    """With one attention layer between embeddings and keys nothing but the positions differs."""
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:1]
    full = prefill(shallow, ids)
    rope = ck.Rope(shallow.model.rotary_emb.inv_freq)
    for inplace in (False, True):
        result = ck.repack_kv(copy.deepcopy(full), KEEP, inplace=inplace, rope=rope)
        short = prefill(shallow, ids[:, KEEP])  # keys of layer 0 depend on token and position alone
        torch.testing.assert_close(result.layers[0].keys, short.layers[0].keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.layers[0].values, short.layers[0].values, atol=1e-5, rtol=0)
        wanted = decode(shallow, short, len(KEEP))
        torch.testing.assert_close(decode(shallow, result, len(KEEP)), wanted, atol=1e-5, rtol=0)


def test_a_shifted_window_decodes_as_before(model, ids):
    """Rotary attention sees differences of positions only: dropping the front and renumbering changes nothing."""
    keep = torch.arange(12, PROMPT)
    full = prefill(model, ids)
    result = ck.repack_kv(full, keep, rope=ck.Rope(model.model.rotary_emb.inv_freq))
    wanted = decode(model, full, PROMPT, masked(keep))
    torch.testing.assert_close(decode(model, result, len(keep)), wanted, atol=1e-5, rtol=0)


def test_generate_goes_on(model, ids):
    cache = ck.repack_kv(prefill(model, ids), KEEP, rope=ck.Rope(model.model.rotary_emb.inv_freq))
    manual, token, expected = copy.deepcopy(cache), torch.full((2, 1), 7), []
    for step in range(5):
        with torch.no_grad():
            logits = model(token, past_key_values=manual, position_ids=torch.full((2, 1), len(KEEP) + step)).logits
        token = logits[:, -1:].argmax(-1)
        expected.append(token)
    prompt = torch.cat([ids[:, KEEP], torch.full((2, 1), 7)], 1)
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, prompt.shape[1] :], torch.cat(expected, 1))


def test_release_shrinks_the_cache(model, ids):
    cache = prefill(model, ids)
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    before = sum(x.untyped_storage().nbytes() for x in tensors)
    wanted = decode(model, ck.repack_kv(cache, KEEP), PROMPT)
    del tensors
    ck.repack_kv(cache, KEEP, inplace=True, release=True)
    after = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    assert after * PROMPT == before * len(KEEP)
    assert torch.equal(decode(model, cache, PROMPT), wanted)


def test_layers_and_heads_may_differ(model, ids):
    full = prefill(model, ids)
    keep = [
        torch.stack([torch.randperm(PROMPT)[: 8 + i].sort().values for _ in range(4)]).view(2, 2, -1)
        for i in range(LAYERS)
    ]
    result = ck.repack_kv(full, keep)
    for i, layer in enumerate(result.layers):
        index = keep[i][..., None].expand(-1, -1, -1, 8)
        assert torch.equal(layer.keys, full.layers[i].keys.gather(2, index))
        assert torch.equal(layer.values, full.layers[i].values.gather(2, index))
    lists = [[torch.arange(PROMPT)[h :: 2 + b] for h in range(2)] for b in range(2)]
    packed = ck.repack_kv(full, lists)
    assert isinstance(packed, ck.PackedKV)
    assert torch.equal(packed.head(2, 1, 1)[1], full.layers[2].values[1, 1, 1::3])
    assert full.get_seq_length() == PROMPT


def static(model, ids):
    return prefill(model, ids, transformers.StaticCache(model.config, max_cache_len=48))


def test_static_cache_keeps_its_buffers(model, ids):
    cache = static(model, ids)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert ck.repack_kv(cache, KEEP, inplace=True) is cache
    assert int(cache.get_seq_length()) == len(KEEP)
    for layer, before in zip(cache.layers, addresses, strict=True):
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before
        assert layer.keys.shape[2] == 48
        assert not layer.keys[:, :, len(KEEP) :].any()
        assert not layer.values[:, :, len(KEEP) :].any()
    wanted = decode(model, ck.repack_kv(prefill(model, ids), KEEP), PROMPT)
    torch.testing.assert_close(decode(model, cache, PROMPT), wanted, atol=1e-5, rtol=0)
    assert int(cache.get_seq_length()) == len(KEEP) + 4


def test_static_cache_with_new_positions(model, ids):
    rope = ck.Rope(model.model.rotary_emb.inv_freq, torch.arange(PROMPT))
    cache = ck.repack_kv(static(model, ids), KEEP, inplace=True, rope=rope)
    wanted = decode(model, ck.repack_kv(prefill(model, ids), KEEP, rope=rope), len(KEEP))
    torch.testing.assert_close(decode(model, cache, len(KEEP)), wanted, atol=1e-5, rtol=0)


def test_what_cannot_be_repacked_is_named(model, ids):
    config = copy.deepcopy(model.config)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.sliding_window = 8
    lists = [[KEEP] * 2] * 2
    full = prefill(model, ids)
    offloading = prefill(model, ids)
    offloading.offloading = True
    quantized = copy.deepcopy(full)
    quantized.layers[1].__class__ = type("QuantoQuantizedLayer", (type(full.layers[1]),), {})
    for cache, options, error, message in [
        (
            transformers.DynamicCache(config=config),
            {},
            TypeError,
            "layer 1 is a DynamicSlidingWindowLayer, only Dynamic",
        ),
        (quantized, {}, TypeError, "layer 1 is a QuantoQuantizedLayer"),
        (offloading, {}, TypeError, "offloading DynamicCache"),
        (transformers.EncoderDecoderCache(full, full), {}, TypeError, "cache is a EncoderDecoderCache"),
        (transformers.DynamicCache(config=model.config), {}, ValueError, "layer 0 of the DynamicCache is empty"),
        (transformers.DynamicCache(), {}, ValueError, "cache has 0 keys"),
        (static(model, ids), {}, ValueError, "a StaticCache keeps its buffers"),
        (static(model, ids), {"inplace": True, "release": True}, ValueError, "a StaticCache keeps its buffers"),
        (static(model, ids), {"inplace": True, "keep": torch.tensor([35])}, IndexError, r"must be in \[0, 30\)"),
        (full, {"inplace": True, "keep": lists}, ValueError, "PackedKV, which a DynamicCache cannot hold"),
    ]:
        options = dict(options)
        with pytest.raises(error, match=message) as caught:
            ck.repack_kv(cache, options.pop("keep", KEEP), **options)
        assert "\n" not in str(caught.value)
