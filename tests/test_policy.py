"""The policy network: the published logits and mask, batches, checkpoints, gradients."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import _decoder

safetensors = pytest.importorskip("safetensors.torch")

FOLDER = Path(__file__).parent / "data" / "policy"
GRID = [(8, 7, 7)]
SMALL = ck.PolicyConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "io.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def policy():
    return ck.CompressionPolicy.from_pretrained(FOLDER)


def small_policy(seed=0, **changes):
    torch.manual_seed(seed)
    policy = ck.CompressionPolicy(dataclasses.replace(SMALL, **changes)).eval()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.5)
    return policy


def prompt(lengths, size=32, seed=1):
    """One row, text and video in turn, of the given lengths; -> embeddings [1, L, D], mask [1, L]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.cat([torch.full((n,), bool(i % 2)) for i, n in enumerate(lengths)])
    return torch.randn(1, len(mask), size, generator=generator), mask[None]


def left_padded(rows):
    longest = max(x.shape[1] for x, _ in rows)
    embeds = torch.full((len(rows), longest, rows[0][0].shape[2]), 7.0)
    video, attention = torch.zeros(2, len(rows), longest, dtype=torch.bool)
    for b, (x, mask) in enumerate(rows):
        embeds[b, longest - x.shape[1] :] = x[0]
        video[b, longest - x.shape[1] :] = mask[0]
        attention[b, longest - x.shape[1] :] = True
    return embeds, video, attention


# ---- against the published code -----------------------------------------------------------------


def test_golden_logits(policy, golden):
    with torch.no_grad():
        hidden = policy.encode(golden["inputs_embeds"], golden["position_ids"])
        video = hidden[golden["video_mask"]]
        token_logits = policy.token_compress(policy.layernorm(video))
        frame_logits = policy.frame_compress(policy.layernorm(video.view(8, 49, -1).mean(1)))
    torch.testing.assert_close(token_logits, golden["token_logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(frame_logits, golden["frame_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden_scores(policy, golden, gradients, backend):
    with torch.set_grad_enabled(gradients), ck.use_backend(backend):
        scores = policy(
            golden["inputs_embeds"],
            video_mask=golden["video_mask"],
            position_ids=golden["position_ids"],
            grid_thw=GRID,
        )
    for mine, logits in [(scores.tokens, golden["token_logits"]), (scores.frames, golden["frame_logits"])]:
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, logits[:, 1] - logits[:, 0], rtol=0, atol=1e-5)
    # The published mode logits carry a factor of 100.
    torch.testing.assert_close(scores.modes[0] / 100, golden["mode_logits"] / 100, rtol=0, atol=1e-5)


def test_golden_mask(policy, golden):
    selection = policy.select(
        golden["inputs_embeds"],
        video_mask=golden["video_mask"],
        grid_thw=torch.tensor(GRID),
        keep_ratio=0.25,
        importance_ratio=0.5,
        max_frame_ratio=0.375,
    )
    assert torch.equal(selection.mask(), golden["mask"].bool())


def test_select_passes_every_option_on(golden, policy):
    arguments = {"video_mask": golden["video_mask"], "grid_thw": GRID}
    with torch.no_grad():
        scores = policy(golden["inputs_embeds"], **arguments)
    for options in [
        {"num_tokens": 50, "importance_ratio": 0.8, "mode": "strict"},
        {"keep_ratio": 0.3, "max_frame_ratio": 0.6, "fill": "none", "order": "score", "check": "raise"},
    ]:
        mine = policy.select(golden["inputs_embeds"], **arguments, **options)
        theirs = ck.select_tokens(scores.tokens, scores.frames, GRID, **options)
        assert torch.equal(mine.indices, theirs.indices)
        assert mine.lengths == theirs.lengths
    mine = policy.select(golden["inputs_embeds"], **arguments, budget="video", num_tokens=50, order="score")
    assert torch.equal(mine.indices, ck.topk_tokens(scores.tokens, GRID, num_tokens=50, order="score").indices)
    with pytest.raises(ValueError, match="importance_ratio"):
        policy.select(golden["inputs_embeds"], **arguments, keep_ratio=0.1, importance_ratio=2.0)
    with pytest.raises(ValueError, match="budget='clip' must be"):
        policy.select(golden["inputs_embeds"], **arguments, keep_ratio=0.1, budget="clip")


# ---- batches ------------------------------------------------------------------------------------


def test_left_padded_batch_equals_single_rows():
    policy = small_policy()
    rows, grids = [prompt([3, 12, 5], seed=1), prompt([9, 2 * 8, 2], seed=2)], [(2, 2, 3), (2, 2, 4)]
    embeds, video, attention = left_padded(rows)
    with torch.no_grad():
        batch = policy(embeds, video_mask=video, attention_mask=attention.long(), grid_thw=grids)
        singles = [policy(x, video_mask=m, grid_thw=[g]) for (x, m), g in zip(rows, grids, strict=True)]
    for name in ("tokens", "frames", "modes"):
        together = torch.cat([getattr(s, name) for s in singles])
        torch.testing.assert_close(getattr(batch, name), together, rtol=1e-4, atol=1e-4)
    kept = policy.select(embeds, video_mask=video, attention_mask=attention, grid_thw=grids, keep_ratio=0.5)
    alone = [
        policy.select(x, video_mask=m, grid_thw=[g], keep_ratio=0.5) for (x, m), g in zip(rows, grids, strict=True)
    ]
    assert kept.lengths == (6, 8)
    assert torch.equal(kept.indices, torch.cat([alone[0].indices, alone[1].indices + 12]))


def test_several_videos_in_one_row():
    policy = small_policy()
    embeds, video = prompt([2, 6, 3, 8, 1])
    grids = [(1, 2, 3), (2, 2, 2)]
    with torch.no_grad():
        scores = policy(embeds, video_mask=video, grid_thw=grids)
        hidden = policy.encode(embeds)
        whole, _ = ck.score_tokens(hidden[video], policy.token_compress, norm_weight=policy.layernorm.weight)
    assert scores.frames.shape == (3,)
    torch.testing.assert_close(scores.tokens, whole)
    selection = policy.select(embeds, video_mask=video, grid_thw=grids, num_tokens=[2, 4])
    assert selection.lengths == (2, 4)
    assert selection.within(video).lengths == (20 - 14 + 6,)


def test_position_ids_default_to_counting_real_tokens():
    policy = small_policy()
    embeds, _ = prompt([3, 12, 5])
    with torch.no_grad():
        default = policy.encode(embeds)
        counted = policy.encode(embeds, torch.arange(20)[None])
        gapped = policy.encode(embeds, torch.arange(0, 60, 3)[None])
        moved = policy.encode(embeds, torch.arange(100, 120)[None])
    assert torch.equal(default, counted)
    assert not torch.allclose(default, gapped, atol=1e-3)
    torch.testing.assert_close(default, moved, rtol=1e-3, atol=1e-3)  # rotary positions are relative


def test_attention_is_bidirectional():
    policy = small_policy()
    embeds, _ = prompt([3, 12, 5])
    changed = embeds.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        assert not torch.allclose(policy.encode(embeds)[:, 0], policy.encode(changed)[:, 0])


def test_the_mode_head_sees_text_alone():
    policy = small_policy()
    embeds, video = prompt([0, 12, 0])
    with torch.no_grad():
        modes = policy(embeds, video_mask=video, grid_thw=[(1, 3, 4)]).modes
        expected = policy.mode_selection(torch.zeros(1, 32)) * 100  # no text: the mean of nothing is zero
    torch.testing.assert_close(modes, expected)


def test_a_long_prompt_passes_the_wide_part_in_pieces(monkeypatch):
    policy = small_policy()
    embeds, _ = prompt([3, 12, 5])
    rows = []
    policy.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    monkeypatch.setattr(_decoder, "ROWS", 8)
    whole = policy.encode(embeds.expand(2, -1, -1))  # a gradient needs every piece again
    with torch.no_grad():
        pieces = policy.encode(embeds.expand(2, -1, -1))
    assert rows == [20, 8, 8, 4]
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_thw": [(1, 2, 5)]}, r"marks \[12\] tokens per row.*whole videos of grid_thw=\[\(1, 2, 5\)"),
        ({"grid_thw": None}, "grid_thw is needed"),
        ({"video_mask": torch.ones(1, 19, dtype=torch.bool)}, r"video_mask must be bool \[B=1, L=20\]"),
        ({"video_mask": torch.ones(1, 20)}, "video_mask must be bool"),
        ({"attention_mask": torch.ones(20)}, r"attention_mask must be \[B=1, L=20\]"),
        ({"position_ids": torch.zeros(3, 1, 20)}, r"position_ids must be \[B=1, L=20\]"),
        ({"inputs_embeds": torch.zeros(20, 32)}, r"inputs_embeds must be \[B, L, D=32\]"),
        ({"inputs_embeds": torch.zeros(1, 20, 16)}, r"inputs_embeds must be \[B, L, D=32\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, message):
    embeds, video = prompt([3, 12, 5])
    arguments = {"inputs_embeds": embeds, "video_mask": video, "grid_thw": [(1, 3, 4)], **change}
    with pytest.raises(ValueError, match=message):
        small_policy()(**arguments)


def test_a_row_must_hold_whole_videos():
    rows = [prompt([3, 10, 5]), prompt([3, 14, 5])]
    embeds, video, attention = left_padded(rows)
    with pytest.raises(ValueError, match=r"marks \[10, 14\] tokens per row"):
        small_policy()(embeds, video_mask=video, attention_mask=attention, grid_thw=[(1, 3, 4)] * 2)


def test_wrong_dtype_is_named():
    embeds, video = prompt([3, 12, 5])
    with pytest.raises(TypeError, match=r"inputs_embeds must be torch\.float32 like the weights"):
        small_policy()(embeds.bfloat16(), video_mask=video, grid_thw=[(1, 3, 4)])


def test_never_reads_the_device():
    """Everything runs on meta tensors, where reading a value is impossible."""
    policy = small_policy().to("meta")
    embeds, video = (x.to("meta") for x in prompt([3, 12, 5]))
    with torch.no_grad(), ck.use_backend("reference"):
        scores = policy(embeds, video_mask=video, attention_mask=torch.ones_like(video), grid_thw=[(2, 2, 3)])
    assert [tuple(x.shape) for x in scores] == [(12,), (2,), (1, 3)]


def test_compiles_without_a_graph_break():
    policy = small_policy()
    run = torch.compile(policy, fullgraph=True, backend="aot_eager")
    embeds, video = prompt([3, 12, 5])
    attention = torch.ones_like(video)
    with torch.no_grad():
        mine = run(embeds, video_mask=video, attention_mask=attention, grid_thw=[(2, 2, 3)])
        theirs = policy(embeds, video_mask=video, attention_mask=attention, grid_thw=[(2, 2, 3)])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ---- precision and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_and_stays_close(golden, dtype):
    policy = ck.CompressionPolicy.from_pretrained(FOLDER, dtype=dtype)
    with torch.no_grad():
        scores = policy(golden["inputs_embeds"].to(dtype), video_mask=golden["video_mask"], grid_thw=GRID)
    expected = golden["token_logits"].diff(dim=-1).squeeze(-1)
    spread = expected.std()
    assert scores.tokens.dtype is torch.float32
    assert ((scores.tokens - expected).abs() / spread).mean() < (0.05 if dtype is torch.bfloat16 else 0.01)


def test_gradients_reach_every_parameter():
    policy = small_policy().train()
    embeds, video = prompt([3, 12, 5])
    scores = policy(embeds.requires_grad_(), video_mask=video, grid_thw=[(2, 2, 3)])
    (scores.tokens.square().sum() + scores.frames.square().sum() + scores.modes.square().sum()).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        # The attention's softmax does not see what all keys share.
        assert p.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name
    assert embeds.grad.abs().max() > 0


def test_trains_under_autocast():
    policy = small_policy().train()
    embeds, video = prompt([3, 12, 5])
    with torch.autocast("cpu", torch.bfloat16):
        scores = policy(embeds, video_mask=video, grid_thw=[(2, 2, 3)])
        with torch.no_grad():
            folded = policy(embeds, video_mask=video, grid_thw=[(2, 2, 3)])
    scores.tokens.sum().backward()
    assert policy.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    torch.testing.assert_close(folded.tokens, scores.tokens.detach(), rtol=0.1, atol=0.1)


# ---- checkpoints --------------------------------------------------------------------------------


def assert_same_parameters(a, b):
    b = b.state_dict()
    assert a.state_dict().keys() == b.keys()
    for name, p in a.state_dict().items():
        assert p.dtype == b[name].dtype
        assert torch.equal(p, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_bit(tmp_path, dtype):
    policy = small_policy(rope_theta=5e5, rms_norm_eps=1e-5).to(dtype)
    policy.save_pretrained(tmp_path / "new" / "folder")
    again = ck.CompressionPolicy.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == policy.config
    assert not again.training
    assert_same_parameters(policy, again)
    assert all(p.requires_grad for p in again.parameters())


def test_saved_keys_are_the_official_ones(tmp_path, policy):
    policy.save_pretrained(tmp_path)
    mine, theirs = (safetensors.load_file(f / "model.safetensors") for f in (tmp_path, FOLDER))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_reads_a_full_model_in_shards(tmp_path, policy, prefix):
    tensors = {prefix + k: v for k, v in safetensors.load_file(FOLDER / "model.safetensors").items()}
    names = sorted(tensors)
    other = {"language_model.model.layers.0.mlp.gate_proj.weight": torch.zeros(3, 3)}
    shards = [
        {k: tensors[k] for k in names[::2]} | other,
        {k: tensors[k] for k in names[1::2]},
        {"vision_tower.weight": torch.zeros(2)},
    ]
    files = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    index = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    for file, shard in zip(files[:2], shards, strict=False):  # the third holds nothing of ours and is not opened
        safetensors.save_file(shard, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((FOLDER / "config.json").read_text())
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    full = {
        "model_type": "llava_onevision",
        "text_config": {**config, "rope_parameters": rope, "rope_theta": None},
    }
    (tmp_path / "config.json").write_text(json.dumps(full))
    again = ck.CompressionPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config
    assert_same_parameters(policy, again)


def test_reads_a_single_file_with_a_given_config(tmp_path, policy):
    shutil.copy(FOLDER / "model.safetensors", tmp_path / "weights.safetensors")
    again = ck.CompressionPolicy.from_pretrained(tmp_path / "weights.safetensors", config=policy.config)
    assert_same_parameters(policy, again)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ck.CompressionPolicy.from_pretrained(tmp_path)


@pytest.fixture
def broken(tmp_path):
    """`broken(change)` writes the golden checkpoint after `change(tensors)`."""

    def write(change):
        tensors = safetensors.load_file(FOLDER / "model.safetensors")
        change(tensors)
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
        shutil.copy(FOLDER / "config.json", tmp_path)
        return tmp_path

    return write


def test_missing_and_unknown_tensors_are_named(broken):
    def change(tensors):
        del tensors["compression_policy.layernorm.weight"]
        tensors["compression_policy.layers.1.extra"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"layernorm\.weight is missing; layers\.1\.extra is unknown"):
        ck.CompressionPolicy.from_pretrained(broken(change))


def test_wrong_shapes_are_named(broken):
    def change(tensors):
        tensors["compression_policy.token_compress.8.weight"] = torch.zeros(3, 8)

    with pytest.raises(ValueError, match=r"token_compress\.8\.weight is \[3, 8\], must be \[2, 8\]"):
        ck.CompressionPolicy.from_pretrained(broken(change))


def test_a_model_without_a_policy_is_refused(broken):
    def change(tensors):
        tensors.clear()
        tensors["lm_head.weight"] = torch.zeros(2, 2)

    with pytest.raises(ValueError, match=r"must hold tensors named 'compression_policy\.\*'"):
        ck.CompressionPolicy.from_pretrained(broken(change))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "policy.pt", "policy.pth"])
def test_pickles_are_refused_unopened(tmp_path, name):
    shutil.copy(FOLDER / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"not even a pickle")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"reading a pickle can run code.*save_file"):
            ck.CompressionPolicy.from_pretrained(path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    shutil.copy(FOLDER / "config.json", tmp_path)
    index = {"weight_map": {"compression_policy.layernorm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="own folder"):
        ck.CompressionPolicy.from_pretrained(tmp_path)


def test_a_missing_safetensors_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'cacovid-kernels\[hf\]'"):
        ck.CompressionPolicy.from_pretrained(FOLDER)


def test_an_empty_folder_is_reported(tmp_path):
    shutil.copy(FOLDER / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        ck.CompressionPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "intermediate_size, num_attention_heads, num_key_value_heads"),
        ({**dataclasses.asdict(SMALL), "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**dataclasses.asdict(SMALL), "rope_scaling": {"type": "yarn"}}, "rope_type='yarn'"),
        ({**dataclasses.asdict(SMALL), "num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({**dataclasses.asdict(SMALL), "hidden_size": 8}, "hidden_size=8 must be >= 16"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        ck.PolicyConfig.from_dict(config)


# ---- from a language model ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_starts_from_a_language_models_first_layer(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=50, head_dim=16, rope_theta=1e4, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    policy = ck.CompressionPolicy.from_language_model(model).eval()
    assert policy.config.rope_theta == 1e4
    assert policy.config.qk_norm == (family == "Qwen3")
    for name, p in policy.layers[0].state_dict().items():
        source = model.model.layers[0].state_dict()[name]
        assert torch.equal(p, source)
        assert p.data_ptr() != source.data_ptr()
    # The last token sees every other one in either kind of attention: there the two layers are the same.
    embeds = torch.randn(1, 9, 64)
    outputs = []
    hook = model.model.layers[0].register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        model(inputs_embeds=embeds)
        mine = policy.encode(embeds)
    hook.remove()
    theirs = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(mine[0, -1], theirs.reshape(9, 64)[-1], rtol=1e-4, atol=1e-5)
    again = ck.CompressionPolicy.from_language_model(model.state_dict(), config.to_dict())
    assert again.config == policy.config


def test_language_model_errors():
    state = {f"model.layers.0.{k}": v for k, v in small_policy().layers[0].state_dict().items()}
    config = dataclasses.asdict(SMALL)
    ck.CompressionPolicy.from_language_model(state, config)
    with pytest.raises(ValueError, match="config is needed"):
        ck.CompressionPolicy.from_language_model(state)
    with pytest.raises(ValueError, match="must hold one"):
        ck.CompressionPolicy.from_language_model({}, config)
    with pytest.raises(ValueError, match="must hold one"):
        ck.CompressionPolicy.from_language_model(state | {"other." + k: v for k, v in state.items()}, config)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight is \[48, 32\], must be \[64, 32\]"):
        ck.CompressionPolicy.from_language_model(state, {**config, "intermediate_size": 64})


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="from_pretrained: nowhere does not exist"):
        ck.CompressionPolicy.from_pretrained("nowhere")
