"""The tiny LLaVA-OneVision of the procedural world: its sizes, its inputs, several questions in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cacovid_kernels.demo.world.questions import ANSWERS, Questions, ask, labels
from cacovid_kernels.demo.world.scenery import SIZE, paint
from cacovid_kernels.demo.world.scenes import SIDE, WorldConfig, draw
from cacovid_kernels.video_models.llava_onevision import AFTER, BEFORE, SPECIAL_TOKENS

READING_LAYERS = 2  # the first layers read the question; the others look for what it names


@dataclass(frozen=True)
class WorldGeometry:
    """Sizes of the network: 6 x 6 tokens per frame after 2 x 2 pooling of 4-pixel patches."""

    width: int = 96
    intermediate: int = 192
    layers: int = 4
    heads: int = 3
    key_value_heads: int = 3
    vision_width: int = 64
    vision_intermediate: int = 256
    rope_theta: float = 1e5


def build_network(geometry: WorldGeometry, tokenizer: Any, seed: int) -> Any:
    """A random `LlavaOnevisionForConditionalGeneration` for the world's words and frames."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = transformers.LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": geometry.width,
            "intermediate_size": geometry.intermediate,
            "num_hidden_layers": geometry.layers,
            "num_attention_heads": geometry.heads,
            "num_key_value_heads": geometry.key_value_heads,
            "max_position_embeddings": 2048,
            "rope_theta": geometry.rope_theta,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": geometry.vision_width,
            "intermediate_size": geometry.vision_intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": SIZE // SIDE // 2,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,  # what is looked up in a video token can be said at once
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.LlavaOnevisionForConditionalGeneration(config)
        # Patches do not look at each other: a token shows its own cell and nothing else, so that the evidence lies
        # where the world's truth says. Attention is silenced, not removed: the class stays Hugging Face's.
        tower = network.model.vision_tower
        for parameter in tower.encoder.layers[0].self_attn.parameters():
            torch.nn.init.zeros_(parameter)
        for unused in (tower.encoder.layers[0].self_attn, tower.encoder.layers[0].layer_norm1, tower.post_layernorm):
            unused.requires_grad_(False)
        # Words and what shows them meet in one space. The first layers join the question's words; in the others
        # attention begins by comparing and copying in that space: a word looks at what shows it, and says what else
        # that shows, before anything is learned.
        torch.nn.init.normal_(network.model.language_model.embed_tokens.weight, std=0.2)
        for layer in network.model.language_model.layers[READING_LAYERS:]:
            torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=geometry.width**-0.5)
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.data.copy_(0.5 * layer.self_attn.v_proj.weight.T)
        torch.nn.init.constant_(network.model.language_model.norm.weight, 0.25)  # else a word would answer itself
    network.generation_config = transformers.GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|im_end|>"]
    )
    return network


def patches(frames: np.ndarray) -> Tensor:
    """Frames `[N, T, S, S, 3]` uint8 -> the four patches of every token, `[N, T * SIDE * SIDE, 4, 3 * 4 * 4]` uint8."""
    n, t, size = frames.shape[:3]
    patch = size // SIDE // 2
    cut = torch.from_numpy(frames).view(n, t, SIDE, 2, patch, SIDE, 2, patch, 3)
    return cut.permute(0, 1, 2, 5, 3, 6, 8, 4, 7).reshape(n, t * SIDE * SIDE, 4, -1)


def encode(network: Any, cut: Tensor, keep: Tensor) -> Tensor:
    """Embeddings `[N, k, D]` of the tokens `keep` `[N, k]` of `patches`: those rows of `get_video_features`.

    Tokens do not depend on each other, so what is not kept is not computed.
    """
    tower = network.model.vision_tower
    embed = tower.embeddings.patch_embedding
    std, mean = torch.tensor(OPENAI_CLIP_STD), torch.tensor(OPENAI_CLIP_MEAN)
    pixels = cut.gather(1, keep[..., None, None].expand(-1, -1, *cut.shape[2:])).unflatten(-1, (3, -1))
    pixels = (pixels / (255 * std[:, None]) - (mean / std)[:, None]).flatten(-2)
    corner = torch.arange(2)[:, None] * 2 * SIDE + torch.arange(2)
    cell = keep % (SIDE * SIDE)
    place = (cell // SIDE * 4 * SIDE + cell % SIDE * 2)[..., None] + corner.flatten()
    hidden = F.linear(pixels, embed.weight.flatten(1), embed.bias) + tower.embeddings.position_embedding(place)
    layer = tower.encoder.layers[0]
    hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return network.model.multi_modal_projector(hidden).mean(2)


@dataclass(frozen=True)
class Prompt:
    """The chat prompt around the video, one block per question, all blocks behind the same video.

    A block sees the video and itself. Its words have the positions of a prompt with this question alone.
    """

    before: Tensor  # [2] int64
    blocks: Tensor  # [N, W] int64: of each question the words, the chat's end, and the answer
    asked: Tensor  # [Q] int64, in W: the place from which the answer is predicted
    kind: Tensor  # [W] int64: the question that a word belongs to
    offset: Tensor  # [W] int64: its place behind the video
    answers: Tensor  # [N, Q] int64: words
    tail: int  # words between the question's last one and the place of the answer


@dataclass(frozen=True)
class Batch:
    """N videos with one question of every kind."""

    patches: Tensor  # [N, T * SIDE * SIDE, 4, 48] uint8
    prompt: Prompt
    truth: Tensor  # [N, Q, T * SIDE * SIDE] bool: tokens that hold the evidence
    labels: Tensor  # [N, T * SIDE * SIDE, LABELS] float32: what each token shows


def world_batch(seed: int, index: Sequence[int] | np.ndarray, tokenizer: Any, config: WorldConfig) -> Batch:
    """Draw, render and ask about the videos (seed, index)."""
    scenes = draw(seed, index, config)
    questions = ask(scenes)
    truth = torch.from_numpy(questions.truth).flatten(2)
    return Batch(patches(paint(scenes)), prompts(questions, tokenizer), truth, torch.from_numpy(labels(scenes)))


def prompts(questions: Questions, tokenizer: Any) -> Prompt:
    """Tokenize all questions about each video; a question's kind fixes its length."""
    number = tokenizer.get_vocab()
    unknown = tokenizer.unk_token_id
    blocks, kind, asked = [], [], []
    offset: list = []
    tails = AFTER.format(question="").replace("<", " <").replace(">", "> ").split()
    answers = torch.tensor([number[word] for word in ANSWERS])[torch.from_numpy(questions.answers)]
    for n, line in enumerate(questions.words):
        row: list[int] = []
        for q, question in enumerate(line):
            ids = [number.get(word, unknown) for word in [*question.split(), *tails]]
            if n == 0:
                asked.append(len(row) + len(ids) - 1)
                kind += [q] * (len(ids) + 1)
                offset += range(len(ids) + 1)
            row += [*ids, int(answers[n, q])]
        blocks.append(row)
    before = torch.tensor([number[word] for word in BEFORE.replace(">", "> ").split()])
    return Prompt(
        before, torch.tensor(blocks), torch.tensor(asked), torch.tensor(kind), torch.tensor(offset), answers, len(tails)
    )


def hidden_states(network: Any, video: Tensor, keep: Tensor, num_tokens: int, prompt: Prompt) -> Tensor:
    """Last hidden states of the questions' words `[N, W, D]`, with `keep` `[N, k]` of the video's tokens.

    Args:
        network: LLaVA-OneVision.
        video: `[N, k, D]` embeddings of the tokens kept.
        keep: `[N, k]` int64, their ascending places in the video: positions are those of the whole prompt.
        num_tokens: tokens of the whole video.
        prompt: the questions.
    """
    n, k = keep.shape
    lead = len(prompt.before)
    table = network.get_input_embeddings()
    before = table(prompt.before).expand(n, -1, -1)
    newline = network.model.image_newline.expand(n, 1, -1)
    embeds = torch.cat([before, video, newline, table(prompt.blocks)], 1)
    end = lead + num_tokens
    fixed = torch.arange(lead).expand(n, -1)
    after = (end + 1 + prompt.offset).expand(n, -1)
    positions = torch.cat([fixed, lead + keep, torch.full((n, 1), end), after], 1)
    prefix, length = lead + k + 1, embeds.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[prefix:, prefix:] &= prompt.kind[:, None] == prompt.kind
    output = network.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask.expand(n, 1, -1, -1),
        use_cache=False,
    )
    return output.last_hidden_state[:, prefix:]


@contextmanager
def watch_attention(network: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """What a decoder layer (counted from 0) compares, once a forward pass inside the block is over.

    `query` `[N, H, L, D]` and `keys` `[N, K, L, D]`, rotated and unscaled.
    """
    attention = network.model.language_model.layers[layer].self_attn
    seen: dict[str, Tensor] = {}

    def look(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        cos, sin = (table.unsqueeze(1) for table in named["position_embeddings"])
        for name, projection in (("query", module.q_proj), ("keys", module.k_proj)):
            x = projection(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            half = x.shape[-1] // 2
            seen[name] = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def grounding_loss(seen: dict[str, Tensor], truth: Tensor, prompt: Prompt) -> Tensor:
    """How far the attention of each question's last word, the mean over all heads, is from its evidence.

    Args:
        seen: from `watch_attention`; as many keys as queries.
        truth: `[N, Q, k]` bool, the evidence among the tokens kept; a question without any does not count.
        prompt: the questions.
    """
    lead, kept = len(prompt.before), truth.shape[-1]
    prefix = lead + kept + 1
    query = seen["query"][:, :, prefix + prompt.asked - prompt.tail]  # [N, H, Q, D]
    logits = query @ seen["keys"][:, :, :prefix].transpose(-1, -2) * query.shape[-1] ** -0.5
    # The mean of probabilities, not of logarithms: one head per kind of name is enough.
    attention = logits.log_softmax(-1)[..., lead : lead + kept].logsumexp(1) - math.log(query.shape[1])
    target = truth / truth.sum(-1, keepdim=True).clamp(min=1)
    return -(target * attention).sum() / truth.any(-1).sum().clamp(min=1)


def predict(network: Any, hidden: Tensor, prompt: Prompt) -> Tensor:
    """Words `[N, Q]` that the network answers."""
    return network.get_output_embeddings()(hidden[:, prompt.asked]).argmax(-1)


def answer_loss(network: Any, hidden: Tensor, prompt: Prompt, weight: Tensor) -> Tensor:
    """Cross entropy of the answers, weighted by `[N, Q]`, and a tenth of that of the end of the chat behind them.

    The answer is asked for twice: where it belongs, and already at the question's last word, from which it is one
    step to the object named. That shorter way is learned first, and the longer one from it.
    """
    head = network.get_output_embeddings()
    target, weight = prompt.answers.flatten(), weight.flatten() / weight.sum()
    total = hidden.new_zeros(())
    for place in (prompt.asked, prompt.asked - prompt.tail):
        logits = head(hidden[:, place]).flatten(0, 1)
        total = total + (F.cross_entropy(logits, target, reduction="none") * weight).sum()
    closing = head(hidden[:, prompt.asked + 1]).flatten(0, 1)
    return total + 0.1 * F.cross_entropy(closing, torch.full((len(closing),), network.generation_config.eos_token_id))
