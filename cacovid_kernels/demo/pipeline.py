"""The demo's run: decode, encode, score, select, gather, generate, and the proof that it was right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacovid_kernels import select_tokens, topk_tokens
from cacovid_kernels.demo.meter import Cost, Meter
from cacovid_kernels.demo.oracle import Agreement, compare
from cacovid_kernels.demo.render import render_clip, write_lossless
from cacovid_kernels.demo.report import Progress
from cacovid_kernels.demo.world import MODEL, POLICY
from cacovid_kernels.demo.world.rows import WORLD, WorldRows
from cacovid_kernels.errors import UserError, first_line, refusing
from cacovid_kernels.integrations.transformers.adapter import Adapter
from cacovid_kernels.integrations.transformers.prompt import Prompt, all_tokens, read
from cacovid_kernels.integrations.transformers.prune import Compacted, arguments, compact
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.policy import CompressionPolicy, PolicyScores
from cacovid_kernels.selection import Selection
from cacovid_kernels.video import Clip, read_clip
from cacovid_kernels.video_models import TinyGeometry, VideoModel, load_model, tiny_model

BOTH, FULL, COMPRESSED = "both", "full", "compressed"
DEMO_SEED = 5  # of the world: nothing was trained or evaluated on it


@dataclass(frozen=True)
class Options:
    """What the command line asks for; without a video and a model, a clip of the procedural world and its own model."""

    video: Path | None = None
    question: str | None = None  # None: the one that belongs to the clip
    keep_ratio: float = 0.1
    budget: str | None = None  # "frames", the published one, or "video"; None: as the policy was trained
    importance_ratio: float = 0.5  # of a budget of frames
    max_frame_ratio: float | None = None
    num_frames: int = 32  # at most
    max_new_tokens: int = 16
    repeats: int = 3  # of every stage after the vision tower; the best time counts
    model: str | None = None
    policy: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    geometry: TinyGeometry = field(default_factory=TinyGeometry)

    @property
    def in_world(self) -> bool:
        return self.video is None and self.model is None

    @property
    def is_random(self) -> bool:
        """Whether nothing was given and nothing known: then the answers mean nothing."""
        return not self.in_world and self.model is None

    @property
    def model_name(self) -> str:
        return WORLD if self.in_world else self.model or "tiny random"


@dataclass(frozen=True)
class Scene:
    """What is looked at and asked for."""

    video: Path
    question: str
    truth: str | None = None  # the right answer, where it is known


@dataclass(frozen=True)
class Result:
    """What a run found."""

    options: Options
    scene: Scene
    clip: Clip
    model: VideoModel
    selection: Selection
    token_scores: Tensor  # [N] float32
    frame_scores: Tensor  # [F] float32
    prompt_tokens: dict[str, int]
    cache_bytes: dict[str, int]
    generated: dict[str, Tensor]  # [G] int64
    costs: dict[tuple[str, str], Cost]
    memory_method: str
    agreement: Agreement

    @property
    def shown(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """A frame of the clip for every frame of tokens, and its time: some models merge frames two by two."""
        t = self.selection.grid_thw[0][0]
        places = [i * len(self.clip.frames) // t for i in range(t)]
        return self.clip.frames[places], tuple(self.clip.timestamps[i] for i in places)

    @property
    def answers(self) -> dict[str, str]:
        """What each run said."""
        texts = {run: self.model.tokenizer.decode(x, skip_special_tokens=True) for run, x in self.generated.items()}
        return {run: " ".join(text.split()) for run, text in texts.items()}


class _FirstToken:
    """A streamer for `generate` that ends the prefill stage when the first token arrives."""

    def __init__(self, meter: Meter, run: str, progress: Callable[[float], None], expected: int) -> None:
        self.meter, self.run, self.progress, self.expected = meter, run, progress, expected
        self.calls = 0

    def put(self, tokens: Tensor) -> None:
        self.calls += 1  # the first call brings the prompt
        self.progress((self.calls - 1) / self.expected)
        if self.calls == 2:
            self.meter.end(self.run, "prefill")
            self.meter.begin()

    def end(self) -> None:
        self.meter.end(self.run, "decode")


@torch.inference_mode()
def run(options: Options, folder: Path, progress: Progress) -> Result:
    """Run the demo.

    Args:
        options: what to run.
        folder: where a rendered clip is written when `options.video` is None.
        progress: shows what is going on.

    Raises:
        UserError: the video, the model or the policy cannot be used.
    """
    device = _device(options.device)
    with progress.stage("render a clip") as advance:
        scene = _scene(options, folder, advance)

    meter = Meter(device)
    with progress.stage("decode the video") as advance, meter.stage(BOTH, "decode video"):
        clip = read_clip(scene.video, options.num_frames, advance)
    with progress.stage("load the model"):
        model = _model(options)
        network = model.network
        network.to(device, _dtype(options.dtype, device, network.dtype))
        with refusing("model", ValueError, RuntimeError):
            adapter = adapter_of(network)
        policy = _policy(options, network)

    with progress.stage("warm up"), refusing("model", ValueError):  # so that no stage pays for loading kernels
        _warm_up(model, adapter, policy, clip, options)
    with refusing("question: the model cannot be asked it", ValueError):
        inputs = model.inputs(clip.frames, scene.question, clip.timestamps)
        with progress.stage("vision tower"), meter.stage(BOTH, "vision tower"):
            prompt = read(network, adapter, inputs)
    whole, _ = compact(prompt, *all_tokens(prompt))
    for _ in range(options.repeats):
        with progress.stage("generate, full prompt") as advance:
            full, _ = _generate(model, adapter, inputs, whole, meter, FULL, options, advance)
    for _ in range(options.repeats):
        with progress.stage("score"), meter.stage(COMPRESSED, "score"):
            scores = _score(policy, prompt)
        with progress.stage("select"), meter.stage(COMPRESSED, "select"):
            selection = _select(scores, prompt.grid_thw[0], options)
        with progress.stage("gather"), meter.stage(COMPRESSED, "gather"):
            short, _ = compact(prompt, selection.indices, selection.lengths)
        with progress.stage("generate, compressed prompt") as advance:
            said, logits = _generate(model, adapter, inputs, short, meter, COMPRESSED, options, advance)
    with progress.stage("compare with the masked full-length run"):
        agreement = compare(network, adapter, inputs, prompt, selection.indices, said, logits)

    lengths = {FULL: whole.input_ids.shape[1], COMPRESSED: short.input_ids.shape[1]}
    text = network.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * whole.inputs_embeds.element_size()
    return Result(
        options=options,
        scene=scene,
        clip=clip,
        model=model,
        selection=selection,
        token_scores=scores.tokens.cpu(),
        frame_scores=scores.frames.cpu(),
        prompt_tokens=lengths,
        cache_bytes={name: length * per_token for name, length in lengths.items()},
        generated={FULL: full.cpu(), COMPRESSED: said.cpu()},
        costs=meter.costs,
        memory_method=meter.method,
        agreement=agreement,
    )


def _scene(options: Options, folder: Path, progress: Callable[[float], None]) -> Scene:
    """The video of the options, else a clip that is rendered into the folder, with a question about it."""
    if options.in_world:
        sample = WorldRows(seed=DEMO_SEED)[options.seed]
        video = folder / "clip.mkv"
        write_lossless(sample.frames, video)
        question = options.question or sample.question
        return Scene(video, question, sample.answer if question == sample.question else None)
    video = options.video or folder / "clip.mp4"
    if options.video is None:
        render_clip(video, seed=options.seed, progress=progress)
    return Scene(video, options.question or "What moves, and where does it go?")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is not available here. Use --device cpu.")
    return torch.device(name)


def _dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else stored


def _model(options: Options) -> VideoModel:
    """The model in `options.model`, else the world's, else a tiny random one."""
    if options.in_world:
        return load_model(str(MODEL))
    return load_model(options.model) if options.model else tiny_model(options.geometry, options.seed)


def _policy(options: Options, network: Any) -> CompressionPolicy:
    """The policy in `options.policy`, else the world's, else the language model's first layer with random heads."""
    folder = options.policy or (POLICY if options.in_world else None)
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            try:
                return CompressionPolicy.from_language_model(network.get_decoder()).eval()
            except ValueError as error:
                raise UserError(f"policy: none can be copied from the model: {error} Give a policy's folder.") from None
    try:
        policy = CompressionPolicy.from_pretrained(folder, dtype=network.dtype, device=network.device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"policy: {folder} cannot be loaded: {first_line(error)}") from None
    width = network.config.get_text_config().hidden_size
    if policy.config.hidden_size != width:
        raise UserError(
            f"policy: {folder} has hidden_size={policy.config.hidden_size}, the model {width}. "
            "Give the policy of this model."
        )
    return policy


def _score(policy: CompressionPolicy, prompt: Prompt) -> PolicyScores:
    return policy(prompt.inputs_embeds, video_mask=prompt.video_mask, grid_thw=prompt.grid_thw)


def _select(scores: PolicyScores, grid: tuple[int, int, int], options: Options) -> Selection:
    if (options.budget or ("video" if options.in_world else "frames")) == "video":
        return topk_tokens(scores.tokens, [grid], keep_ratio=options.keep_ratio)
    return select_tokens(
        scores.tokens,
        scores.frames,
        [grid],
        keep_ratio=options.keep_ratio,
        importance_ratio=options.importance_ratio,
        max_frame_ratio=options.max_frame_ratio,
    )


def _generate(
    model: VideoModel,
    adapter: Adapter,
    inputs: dict[str, Any],
    prompt: Compacted,
    meter: Meter,
    run: str,
    options: Options,
    progress: Callable[[float], None],
) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[G]` and the logits `[G, V]` they were taken from."""
    given = arguments(model.network, adapter, inputs, prompt)
    meter.begin()
    output: Any = model.network.generate(
        **given,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=_FirstToken(meter, run, progress, options.max_new_tokens),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(output.logits)
    return output.sequences[0, -len(logits) :], logits


def _warm_up(model: VideoModel, adapter: Adapter, policy: CompressionPolicy, clip: Clip, options: Options) -> None:
    few = min(2, len(clip.frames))
    inputs = model.inputs(clip.frames[:few], "", clip.timestamps[:few])
    prompt = read(model.network, adapter, inputs)
    selection = _select(_score(policy, prompt), prompt.grid_thw[0], options)
    short, _ = compact(prompt, selection.indices, selection.lengths)
    two = replace(options, max_new_tokens=2)
    _generate(model, adapter, inputs, short, Meter(model.network.device), "", two, lambda fraction: None)
