"""The demo's run: decode, encode, score, select, gather, generate, and the proof that it was right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacovid_kernels import gather_tokens, select_tokens, topk_tokens
from cacovid_kernels.demo.meter import Cost, Meter
from cacovid_kernels.demo.oracle import Agreement, compare
from cacovid_kernels.demo.render import render_clip, write_lossless
from cacovid_kernels.demo.report import Progress
from cacovid_kernels.demo.world import MODEL, POLICY
from cacovid_kernels.demo.world.rows import WORLD, WorldRows
from cacovid_kernels.errors import UserError
from cacovid_kernels.policy import CompressionPolicy, PolicyScores
from cacovid_kernels.selection import Selection
from cacovid_kernels.video import Clip, read_clip
from cacovid_kernels.video_models import LlavaOneVision, TinyGeometry, load_llava_onevision, tiny_model

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
    def policy_name(self) -> str:
        return str(self.policy) if self.policy else WORLD if self.in_world else "random heads"


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
    model: LlavaOneVision
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
        if options.in_world:
            model = replace(load_llava_onevision(str(MODEL)), name=WORLD)
        elif options.model:
            model = load_llava_onevision(options.model)
        else:
            model = tiny_model(options.geometry, options.seed)
        model.network.to(device, _dtype(options.dtype, device, model.network.dtype))
        policy = _policy(options, model)

    grid = model.grid(len(clip.frames))
    ids = model.prompt(scene.question, grid[0] * grid[1] * grid[2])
    video_mask = model.video_mask(ids)
    with progress.stage("warm up"):  # so that no stage pays for loading kernels
        _warm_up(model, policy, options)
    with progress.stage("vision tower") as advance, meter.stage(BOTH, "vision tower"):
        embeds = model.embed(ids, model.encode_video(model.pixels(clip.frames), advance))
    positions = torch.arange(ids.shape[1], device=device)[None]
    # An explicit mask: without one, gaps in the positions would be read as the borders of packed sequences.
    mask = torch.ones_like(ids)

    for _ in range(options.repeats):
        with progress.stage("generate, full prompt") as advance:
            full, _ = _generate(model, meter, FULL, (embeds, positions, mask), options, advance)
    for _ in range(options.repeats):
        with progress.stage("score"), meter.stage(COMPRESSED, "score"):
            scores: PolicyScores = policy(embeds, video_mask=video_mask, grid_thw=[grid])
        with progress.stage("select"), meter.stage(COMPRESSED, "select"):
            selection = _select(scores, grid, options)
        with progress.stage("gather"), meter.stage(COMPRESSED, "gather"):
            prompt = selection.within(video_mask)
            inputs = gather_tokens((embeds, positions, mask), prompt, dim=1)
        with progress.stage("generate, compressed prompt") as advance:
            short, logits = _generate(model, meter, COMPRESSED, inputs, options, advance)
    with progress.stage("compare with the masked full-length run"):
        agreement = compare(model.network, embeds, prompt.mask(), short, logits)

    lengths = {FULL: ids.shape[1], COMPRESSED: inputs[0].shape[1]}
    text = model.network.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * embeds.element_size()
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
        generated={FULL: full.cpu(), COMPRESSED: short.cpu()},
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


def _policy(options: Options, model: LlavaOneVision) -> CompressionPolicy:
    """The policy in `options.policy`, else the world's, else the language model's first layer with random heads."""
    network, folder = model.network, options.policy or (POLICY if options.in_world else None)
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return CompressionPolicy.from_language_model(network.model.language_model).eval()
    try:
        policy = CompressionPolicy.from_pretrained(folder, dtype=network.dtype, device=network.device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"policy: {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    width = network.config.get_text_config().hidden_size
    if policy.config.hidden_size != width:
        raise UserError(
            f"policy: {folder} has hidden_size={policy.config.hidden_size}, the model {width}. "
            "Give the policy of this model."
        )
    return policy


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
    model: LlavaOneVision,
    meter: Meter,
    run: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    options: Options,
    progress: Callable[[float], None],
) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[G]` and the logits `[G, V]` they were taken from."""
    embeds, positions, mask = inputs
    meter.begin()
    output: Any = model.network.generate(
        inputs_embeds=embeds,
        position_ids=positions,  # decoding goes on from the last one, gaps or not
        attention_mask=mask,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=_FirstToken(meter, run, progress, options.max_new_tokens),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0], torch.cat(output.logits)


def _warm_up(model: LlavaOneVision, policy: CompressionPolicy, options: Options) -> None:
    grid = model.grid(1)
    ids = model.prompt("", grid[1] * grid[2])
    video_mask = model.video_mask(ids)
    side = model.network.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, device=model.device, dtype=model.network.dtype)
    embeds = model.embed(ids, model.encode_video(pixels, lambda fraction: None))
    selection = _select(policy(embeds, video_mask=video_mask, grid_thw=[grid]), grid, options)
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    inputs = gather_tokens((embeds, positions, torch.ones_like(ids)), selection.within(video_mask), dim=1)
    two = replace(options, max_new_tokens=2)
    _generate(model, Meter(model.device), "", inputs, two, lambda fraction: None)
