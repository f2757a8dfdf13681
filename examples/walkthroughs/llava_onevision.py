# %% [markdown]
# # LLaVA-OneVision on a tenth of its video tokens
#
# You know `transformers` and not yet this library. In ten minutes: one line that drops video tokens, what it costs and
# saves, which tokens stay and who decides, why the answer is not an approximation of anything, a second question, and a
# gradient.
#
# Nothing is downloaded: a LLaVA-OneVision of 453,760 parameters comes along, trained from scratch on short clips of
# moving shapes. It is a real `LlavaOnevisionForConditionalGeneration` with real answers, only small.
#
# `pip install '.[docs]'`, then open this file as a notebook, or run it for what it prints:
# `python examples/walkthroughs/llava_onevision.py`

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers.utils import logging

from cacovid_kernels import CompressionPolicy
from cacovid_kernels.compressors import divprune, evs
from cacovid_kernels.demo.world import MODEL, POLICY
from cacovid_kernels.demo.world.rows import WorldRows
from cacovid_kernels.integrations.transformers import compress, next_turn, prune_inputs
from cacovid_kernels.video_models import load_model
from cacovid_kernels.viz import plot_selection

logging.disable_progress_bar()
world = load_model(str(MODEL))
model, tokenizer = world.network.float(), world.tokenizer

# %% [markdown]
# ## A video and a question
#
# A clip has 8 frames of 48 x 48 pixels, a frame 6 x 6 video tokens. `ask` gives what a processor would.
#
# *With a checkpoint of the hub*, make `model` and `inputs` as `examples/transformers/llava_onevision.py` does, with
# `AutoModelForImageTextToText` and `AutoProcessor`, and pass `divprune` where this passes the small model's own policy.

# %%
frames = WorldRows(seed=5)[4].frames  # [8, 48, 48, 3] uint8
grid = world.grid(len(frames))  # frames, rows, columns
answers = {
    "what colour is the pole when it glows": "green",
    "what colour is the triangle": "green",
    "which shape is purple": "diamond",
    "where is the pink square": "west",
    "which way goes the star": "up",
    "which comes first in yellow": "square",
}


def ask(question):
    return world.inputs(frames, question)


def said(ids):
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


question = "what colour is the pole when it glows"
inputs = ask(question)
length = inputs["input_ids"].shape[1]
ids = model.generate(**inputs, max_new_tokens=4)
print(f"{length} tokens in the prompt, {np.prod(grid)} of them video")
print(f"{question}? {said(ids[:, length:])}")

# %% [markdown]
# ## One line
#
# Around `generate` goes a `with`. What chooses the tokens here is a policy that was trained on this model's answers. It
# was trained to take the best of the whole video (`budget="video"`); the published policies give each frame a budget,
# which is the default.

# %%
policy = CompressionPolicy.from_pretrained(POLICY, dtype=torch.float32)

with compress(model, policy, keep_ratio=0.1, budget="video") as compression:
    ids = model.generate(**inputs, max_new_tokens=4)

print(f"{compression.kept[0]} of {np.prod(grid)} video tokens kept")
print(f"{question}? {said(ids[:, length:])}")

# %% [markdown]
# `ids` starts with the whole prompt, as ever, and after the block the model is as it was. No class was patched.
#
# ## What was kept
#
# `prune_inputs` is what `compress` does before it calls `generate`: it returns the arguments for the shorter prompt.
# A token that stays keeps its position, so the positions say which ones did.


# %%
def kept_tokens(out):
    """[frames, rows, columns] bool: the video tokens in what prune_inputs returned."""
    first = int(video_mask[0].nonzero()[0])
    places = torch.arange(first, first + np.prod(grid))
    return torch.isin(places, out["position_ids"][0]).view(grid)


video_mask = inputs["input_ids"] == model.config.video_token_id
video_mask[0, video_mask[0].nonzero()[-1]] = False  # the newline behind the video is structure
whole = prune_inputs(model, inputs, policy, keep_ratio=1.0, budget="video")
out = prune_inputs(model, inputs, policy, keep_ratio=0.1, budget="video")
with torch.no_grad():
    scores = policy(whole["inputs_embeds"], video_mask=video_mask, grid_thw=[grid]).tokens
plot_selection(frames, kept_tokens(out), scores, title=f"{question}?", columns=4)

# %% [markdown]
# Bright tokens were kept. The heat below each frame is the policy's score. It has read the question: highest are
# objects that glow, on white. Two of them in frame 3 are green: the upright one is the pole, the other a bar. A tenth
# is more than this question needs: the rest goes to other objects and to flicker.
#
# ## What it saves
#
# Ratios on the machine that ran this. The vision tower works as much as before; what shrinks is the language model's
# prefill, its cache, and every step of decoding behind it. Scoring costs one decoder layer over the whole prompt, a
# fourth of what this small model does with all tokens. Beside a language model that reads a tenth it is never little:
# 42 % of the first token at 24 layers of LLaVA-OneVision 0.5B's size, 1.7 % with the vision tower counted
# (`bench/results/generate.md`).


# %%
def fastest(*functions, repeats=30):
    """The shortest time of each; they take turns, so that whatever else runs disturbs all of them."""
    times = []
    with torch.no_grad():
        for function in functions * repeats:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [min(times[i :: len(functions)]) for i in range(len(functions))]


full_time, short_time, policy_time = fastest(
    lambda: model(**whole),
    lambda: model(**out),
    lambda: policy(whole["inputs_embeds"], video_mask=video_mask, grid_thw=[grid]),
)
print(f"prompt: {length} tokens, compressed {out['inputs_embeds'].shape[1]}")
print(f"prefill: about {full_time / short_time:.0f} times as fast")
print(f"with the policy's scoring: about {full_time / (short_time + policy_time):.0f} times as fast")

# %% [markdown]
# ## Who decides
#
# A selector is a policy, a published compressor, or a function of your own: it gets the embeddings `[N, D]` of a
# prompt's video tokens and the grid of each of its videos, and returns scores `[N]`. This one scores a token by its
# distance from the mean of its frame.


# %%
def unlike_its_frame(embeddings, grids):
    [(t, h, w)] = grids
    tokens = embeddings.view(t, h * w, -1)
    return (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1).flatten()


selectors = {
    "trained policy": {"selector": policy, "budget": "video"},
    "divprune": {"selector": divprune},
    "evs": {"selector": evs},
    "unlike its frame": {"selector": unlike_its_frame},
}
figure, axes = plt.subplots(4, 8, figsize=(10, 5.8), dpi=80, layout="constrained")
for row, (name, choice) in zip(axes, selectors.items(), strict=True):
    kept = kept_tokens(prune_inputs(model, inputs, keep_ratio=0.1, **choice)).numpy()
    for panel, frame, cells in zip(row, frames, kept, strict=True):
        bright = np.kron(cells, np.ones((8, 8)))[..., None] > 0
        panel.imshow(np.where(bright, frame, frame // 4), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
    row[0].set_title(name, loc="left", fontsize=10)
plt.show()

# %% [markdown]
# The same budget, four opinions. `divprune` takes tokens that differ from each other, whatever they show. `evs` takes
# what changed since the frame before: all of the first frame is new, which eats so small a budget. Only the policy has
# read the question. How many of six questions about this clip are answered right:


# %%
def right(choice, ratio):
    count = 0
    for question, truth in answers.items():
        asked = ask(question)
        with compress(model, keep_ratio=ratio, **choice):
            ids = model.generate(**asked, max_new_tokens=4)
        count += said(ids[:, asked["input_ids"].shape[1] :]) == truth
    return count


ratios = (1.0, 0.25, 0.1, 0.05)
table = {name: [right(choice, ratio) for ratio in ratios] for name, choice in selectors.items()}
print(" " * 18 + "".join(f"{ratio:>7.0%}" for ratio in ratios))
for name, counts in table.items():
    print(f"{name:18}" + "".join(f"{count:>5}/6" for count in counts))

# %% [markdown]
# Six questions are an illustration; `docs/results` has 3,000 fresh ones for every rule and ratio.
#
# ## The tensors
#
# What `prune_inputs` returns goes into `model.generate(**out)` or `model(**out)`. The embeddings are already merged, so
# there are no pixels and no ids, and the positions have gaps where tokens went.

# %%
for name, tensor in out.items():
    print(f"{name:15} {list(tensor.shape)}")
print("positions:", *out["position_ids"][0].tolist())

# %% [markdown]
# The tokens of the text in front and behind are all there, and so is the newline that ends a video: structure is never
# dropped. The mask comes along although nothing is masked: without one, `transformers` reads every gap in the positions
# as the start of another packed sequence, and says nothing.
#
# ## The proof
#
# Dropping tokens approximates the *answer*, but the computation is exact: it is the run at full length in which nobody
# may look at the dropped tokens. Mask them, leave everything in its place, and compare the logits:

# %%
positions = out["position_ids"][0]
mask = torch.zeros_like(inputs["input_ids"])
mask[:, positions] = 1
with torch.no_grad():
    masked = model(**{**inputs, "attention_mask": mask}, position_ids=torch.arange(length)[None]).logits[:, positions]
    short = model(**out).logits
torch.testing.assert_close(short, masked, atol=1e-5, rtol=0)
print("equal to 1e-5, and the same word:", said(short[:, -1].argmax(-1)[None]))

# %% [markdown]
# With positions that close up, 0, 1, 2, ..., which is what slicing the embeddings and nothing else would give, it is
# another computation:

# %%
renumbered = {**out, "position_ids": torch.arange(len(positions))[None]}
with torch.no_grad():
    error = (model(**renumbered).logits - masked).abs().max()
print(f"renumbered: off by {error:.1f}, in logits of at most {masked.abs().max():.0f}")

# %% [markdown]
# ## Another question
#
# The cache of the compressed prompt can be kept: the video need not be read again. This model was trained on one
# question per video, so the next question takes the place of the last. The cache is cut behind the video, and
# `next_turn` gives `generate` the positions and the mask that fit it. (In a dialogue nothing is cut; the walk-through
# of Qwen3-VL has one.)


# %%
def answer_next(choice, ratio):
    """Right answers to another question on the cache that was compressed for the first, over all pairs of questions."""
    count = 0
    for first in answers:
        asked = ask(first)
        behind = 1 + int((asked["input_ids"][0] == model.config.video_token_id).nonzero().max())
        out = prune_inputs(model, asked, keep_ratio=ratio, **choice)
        cache = model.generate(**out, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        end = out["position_ids"].shape[1] - asked["input_ids"][0, behind:].numel()
        video = {name: out[name][:, :end] for name in ("attention_mask", "position_ids")}
        for second in answers.keys() - {first}:
            cache.crop(end - cache.get_seq_length())
            turn = next_turn(video, cache, ask(second)["input_ids"][:, behind:])
            ids = model.generate(**turn, max_new_tokens=4)
            count += said(ids[:, turn["input_ids"].shape[1] :]) == answers[second]
    return count


following = {}
for name in ("trained policy", "divprune"):
    following[name] = [answer_next(selectors[name], ratio) for ratio in (0.25, 0.1)]
    print(f"{name:18} 25%: {following[name][0]:2} of 30    10%: {following[name][1]:2} of 30")

# %% [markdown]
# Mind what a selector looks at. The policy keeps what the first question needs, and less is left for the others;
# `divprune` has never seen a question and serves all of them, if it may keep enough. For a dialogue about one video
# choose without the question, or compress again for each.
#
# ## A gradient
#
# The kept embeddings are still a function of the pixels, and labels are compacted with the tokens: a loss on the
# compressed prompt trains whatever made the tokens. In this small model each token is made from its own pixels alone,
# so one can see where the gradient arrives: in the cells that were kept, all of them, and nowhere else.

# %%
asked = ask("which way goes the star")
answer = tokenizer("up", add_special_tokens=False, return_tensors="pt")["input_ids"]
ids = torch.cat([asked["input_ids"], answer], dim=1)
labels = ids.clone()
labels[:, :-1] = -100  # only the answer counts
pixels = asked["pixel_values_videos"].requires_grad_()
sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}

batch = prune_inputs(model, sample, divprune, keep_ratio=0.1, labels=labels)
loss = model(**batch).loss
loss.backward()
reached = pixels.grad[0].unflatten(2, (6, 8)).unflatten(4, (6, 8)).abs().sum((1, 3, 5)) > 0  # [frames, rows, columns]
same = torch.equal(reached, kept_tokens(batch))
print(f"loss {loss:.2f} on {batch['inputs_embeds'].shape[1]} of {ids.shape[1]} tokens")
print(f"a gradient in {int(reached.sum())} of {reached.numel()} cells, which are the kept ones: {same}")

# %% [markdown]
# ## From here
#
# - `docs/integrations.md`: the nine families, batches, caches, several videos in a prompt, another family.
# - `examples/walkthroughs/qwen3_vl.py`: what timestamps, deepstack and M-RoPE add.
# - `docs/training.md`: a policy for your own model. `"data": "world", "model": "world"` trains this one on a laptop.
# - `cacovid_kernels.viz.report`: the picture above as a page with a slider.
