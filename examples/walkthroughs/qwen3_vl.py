# %% [markdown]
# # Qwen3-VL: what is different
#
# `compress` around `generate` is the same line for every family; the walk-through of LLaVA-OneVision explains it, the
# selectors and what is saved. Under that line four things differ for Qwen3-VL:
#
# - a timestamp stands in front of every frame, and structural tokens between frames;
# - a token has three positions, time, row and column (M-RoPE);
# - vision features enter again in the first layers (deepstack), so embeddings alone do not carry a video;
# - the next position behind a video is not the number of tokens so far.
#
# All of them break silently when tokens are sliced out by hand. `transformers` must be 5.18 or newer.
#
# `python examples/walkthroughs/qwen3_vl.py Qwen/Qwen3-VL-2B-Instruct clip.mp4` runs this on a checkpoint and a video of
# yours; in a notebook, fill in `CHECKPOINT`. Without them it builds a **tiny random model: its answers mean nothing**.
# Its prompt, positions and kept tokens, and the comparisons of logits, are as real as with a checkpoint.

# %%
import re
import sys

import matplotlib.pyplot as plt
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cacovid_kernels.compressors import divprune
from cacovid_kernels.demo.world.rows import WorldRows
from cacovid_kernels.demo.world.scenes import WorldConfig
from cacovid_kernels.integrations.transformers import compress, next_turn, prune_inputs
from cacovid_kernels.video import read_clip
from cacovid_kernels.viz import plot_selection

transformers.utils.logging.disable_progress_bar()
CHECKPOINT = None  # a notebook: ("Qwen/Qwen3-VL-2B-Instruct", "clip.mp4")
if "ipykernel" not in sys.modules and len(sys.argv) == 3:
    CHECKPOINT = tuple(sys.argv[1:])

# %% [markdown]
# ## A checkpoint, or a stand-in
#
# float32 makes the comparisons below sharp; for use, `dtype="auto"` halves the memory. `inputs` is what the processor
# returns. Skip the second function: it plays a processor and a model, on 16 frames of a clip of moving shapes.


# %%
def from_checkpoint(name, video):
    processor = transformers.AutoProcessor.from_pretrained(name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="float32", device_map="auto")
    content = [{"type": "video", "path": video}, {"type": "text", "text": "What happens in this video?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], num_frames=16, **options)
    clip = read_clip(video, int(inputs["video_grid_thw"][0, 0]))  # for the picture: one frame per pair of frames
    return model, processor.tokenizer, dict(inputs.to(model.device)), clip.frames, clip.timestamps


def stand_in():
    frames = WorldRows(seed=5, config=WorldConfig(frames=16))[2].frames  # [16, 48, 48, 3] uint8, two per second
    t, h, w, patch = 8, 12, 12, 4  # pairs of frames, and patches per side; 2 x 2 patches are merged into a token

    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a token per byte
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(marks)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    start, end, video, image = (tokenizer.convert_tokens_to_ids(mark) for mark in marks[2:])

    seconds = [round(pair + 0.25, 1) for pair in range(t)]  # the middle of each pair, as the prompt names it
    shown = "".join(f"<{s:.1f} seconds>{marks[2]}{marks[4] * (h * w // 4)}{marks[3]}" for s in seconds)
    ids = tokenizer(f"{marks[0]}user\n{shown}What happens?{marks[1]}\n{marks[0]}assistant\n", return_tensors="pt")
    ids = ids["input_ids"]
    pixels = torch.from_numpy(frames).float() / 127.5 - 1
    pixels = pixels.reshape(t, 2, h // 2, 2, patch, w // 2, 2, patch, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == video).int(),
        "pixel_values_videos": pixels.reshape(t * h * w, -1),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }

    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64, "depth": 4, "num_heads": 4}
    vision |= {"patch_size": patch, "num_position_embeddings": h * w, "deepstack_visual_indexes": [0, 1, 2]}
    tokens = {"vision_start_token_id": start, "vision_end_token_id": end, "video_token_id": video}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=image, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model, tokenizer, inputs, frames[::2], seconds


model, tokenizer, inputs, frames, seconds = from_checkpoint(*CHECKPOINT) if CHECKPOINT else stand_in()
ids, video_id = inputs["input_ids"], model.config.video_token_id
merge = model.config.vision_config.spatial_merge_size
t, h, w = inputs["video_grid_thw"][0].tolist()  # pairs of frames, rows and columns of patches
grid = t, h // merge, w // merge  # of video tokens

# %% [markdown]
# ## The prompt
#
# The number in brackets stands for that many video tokens.


# %%
def outline(ids):
    text = re.sub(r"(<\|video_pad\|>)+", lambda run: f"[{len(run[0]) // 13}]", tokenizer.decode(ids[0]))
    return text.replace("<|vision_end|>", "<|vision_end|>\n").strip()


print(outline(ids))

# %% [markdown]
# Dropping tokens thins the runs. Timestamps and marks around frames always stay, also those of a frame that keeps
# nothing: `<|vision_start|><|vision_end|>` still says that there was a frame, and when.

# %%
out = prune_inputs(model, inputs, divprune, keep_ratio=0.05)
print(outline(out["input_ids"]))
assert torch.equal(ids[ids != video_id], out["input_ids"][out["input_ids"] != video_id])

# %% [markdown]
# ## Three positions per token
#
# Positions are those of the whole prompt, gathered. In Qwen3-VL all tokens of a frame share a time, rows and columns
# count from there, and the text behind goes on above the largest: a frame of 6 x 6 tokens takes 6 positions, not 36.


# %%
def loudest(embeddings, grids):
    return embeddings.norm(dim=-1)


whole = prune_inputs(model, inputs, loudest, keep_ratio=1.0)  # everything stays, whoever selects
before, after = whole["position_ids"][1:, 0].cpu(), out["position_ids"][1:, 0].cpu()  # [3, L] and [3, L']
kept = (before[:, :, None] == after[:, None, :]).all(0).any(1)  # [L] bool: positions tell tokens apart

end = int((ids[0] == model.config.vision_end_token_id).nonzero()[1]) + 2  # two frames
place, is_video = torch.arange(end), (ids[0, :end] == video_id).cpu()
figure, axis = plt.subplots(figsize=(10, 4.2), dpi=80, layout="constrained")
axis.scatter(place[~is_video], before[0, :end][~is_video], s=14, color="black", label="text: one position, three times")
for row, (name, style) in enumerate({"time": ("C0", "s"), "row": ("C1", "o"), "column": ("C2", "^")}.items()):
    axis.scatter(place[is_video], before[row, :end][is_video], s=5, color="0.8", label="dropped" if row == 0 else None)
    stays = kept[:end] & is_video
    axis.scatter(place[stays], before[row, :end][stays], s=45, color=style[0], marker=style[1], label=f"kept: {name}")
axis.set(xlabel="token of the prompt", ylabel="position")
axis.legend()
plt.show()

# %% [markdown]
# `position_ids` has four rows. The one in front counts 0, 1, 2, ... and serves masks alone: times that stand still or
# jump would be read as the starts of packed sequences.

# %%
last = out["position_ids"][:, 0, -1].tolist()
print(f"position_ids {list(out['position_ids'].shape)} for {out['input_ids'].shape[1]} tokens, of {len(kept)}")
print(f"the last token: number {last[0]}, position {last[1:]}; without compression {before[:, -1].tolist()}")

# %% [markdown]
# Which tokens these are, on the first frame of every pair:

# %%
cells = kept[(ids[0] == video_id).cpu()].view(grid)
plot_selection(frames, cells, timestamps=seconds, columns=4)

# %% [markdown]
# `divprune` keeps tokens that differ from each other. (With the stand-in: in features of a random vision tower.)
#
# ## Deepstack
#
# Features of three early layers of the vision tower are added again inside the first layers of the language model, at
# the video's tokens. So there are no `inputs_embeds` here: ids and the encoder's outputs go in together, thinned alike.

# %%
video = out["mm_encoder_outputs"]["video"]
print("arguments:", ", ".join(out))
print("features", list(video.pooler_output[0].shape))
print("deepstack", *(list(layer[0].shape) for layer in video.deepstack_features))

with torch.no_grad():
    short = model(**out).logits[0]
    merged = model.get_input_embeddings()(out["input_ids"])
    merged = merged.masked_scatter((out["input_ids"] == video_id)[..., None], video.pooler_output[0].to(merged))
    places = {name: out[name] for name in ("position_ids", "attention_mask")}
    without = model(inputs_embeds=merged, **places).logits[0]
print(f"embeddings alone: logits off by {(without - short).abs().max():.1f} of {short.abs().max():.1f}")

# %% [markdown]
# ## The proof
#
# As for every family: the run at full length in which nobody may look at the dropped tokens, timestamps, deepstack and
# M-RoPE included.


# %%
def masked_logits(sample, kept):
    """Logits `[K, V]` of the K kept tokens (`kept` `[L]` bool), at full length."""
    positions = prune_inputs(model, sample, loudest, keep_ratio=1.0)["position_ids"]
    with torch.no_grad():
        return model(**{**sample, "attention_mask": kept[None].long()}, position_ids=positions).logits[0, kept]


kept = kept.to(ids.device)
masked = masked_logits(inputs, kept)
difference = (short - masked).abs().max().item()
print(f"largest difference {difference:.0e}, in logits of at most {masked.abs().max():.1f}, over {len(short)} tokens")

# %% [markdown]
# ## A dialogue
#
# `compress` keeps what the cache was made from. `next_turn` gets everything said since: the answer as generated, then
# the next question. New positions go on behind the largest of the compressed prompt in all three rows; the row in front
# goes on counting tokens.

# %%
with compress(model, divprune, keep_ratio=0.05) as compression:
    first = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
answer = first.sequences[:, ids.shape[1] :]  # a checkpoint's ends with <|im_end|>
question = "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
said = torch.cat([answer, tokenizer(question, return_tensors="pt")["input_ids"].to(ids.device)], dim=1)

turn = next_turn(compression.inputs, first.past_key_values, said)
print(f"a cache of {first.past_key_values.get_seq_length()} tokens lacks {turn['input_ids'].shape[1]}")
print(f"their first: number {int(turn['position_ids'][0, 0, 0])}, position {turn['position_ids'][1:, 0, 0].tolist()}")
options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
second = model.generate(**turn, max_new_tokens=16, **options)
if CHECKPOINT:
    print(tokenizer.decode(answer[0]), "|", tokenizer.decode(second.sequences[0, turn["input_ids"].shape[1] :]))

# %% [markdown]
# The whole dialogue at full length, dropped tokens masked, gives the same logits for the first word of its answer:

# %%
dialogue = torch.cat([ids, said], dim=1)
sample = {
    **inputs,
    "input_ids": dialogue,
    "attention_mask": torch.ones_like(dialogue),
    "mm_token_type_ids": 2 * (dialogue == video_id).int(),
}
masked = masked_logits(sample, torch.cat([kept, kept.new_ones(said.shape[1])]))
later_difference = (second.logits[0][0] - masked[-1]).abs().max().item()
print(f"largest difference {later_difference:.0e}")

# %% [markdown]
# ## From here
#
# - `examples/transformers/qwen3_vl.py`: the same in 16 lines, for use.
# - `docs/integrations.md`: batches, several videos and images, training, other families.
# - Qwen2-VL and Qwen2.5-VL have M-RoPE too, but no timestamps and no deepstack: they take `inputs_embeds`.
