"""A Video-LLM of transformers on fewer video tokens, as lmms-eval asks it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from cacovid_kernels import compressors
from cacovid_kernels.integrations.lmms_eval.messages import OP, Conversations, read
from cacovid_kernels.integrations.transformers.context import compress
from cacovid_kernels.integrations.transformers.registry import adapter_of
from cacovid_kernels.integrations.transformers.selectors import Selector, check_selector
from cacovid_kernels.integrations.transformers.tiles import TiledAdapter
from cacovid_kernels.policy import CompressionPolicy

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        f"cacovid_kernels.integrations.lmms_eval needs lmms-eval ({error}). Install it: "
        f"pip install 'cacovid-kernels[lmms-eval]'."
    ) from error

SELECTORS = {f.__name__: f for f in (compressors.divprune, compressors.evs, compressors.vidcom2)}
_ARGUMENTS = (
    "pretrained",
    "keep_ratio",
    "num_tokens",
    "selector",
    "policy",
    "budget",
    "max_num_frames",
    "dtype",
    "attn_implementation",
    "batch_size",
    "device",
)


class Cacovid(lmms):
    """A Video-LLM of transformers that answers the tasks of lmms-eval from fewer video tokens.

    Every family of docs/integrations.md. Videos are files; images stay whole; prompts without a video run as they
    are. Answers are generated from the model's own chat template, up to the end or `max_new_tokens` (1024 unless
    the task says otherwise); greedily unless the task gives a temperature. Other generation settings of a task are
    `top_p`, `top_k` and `num_beams`; `until` is left to the model, as in the other chat models of lmms-eval.

    Args:
        pretrained: name or folder of the model.
        keep_ratio: share of each video's tokens that is kept, in (0, 1].
        num_tokens: tokens kept per video instead, >= 1.
        selector: "divprune" (the default), "evs" or "vidcom2".
        policy: folder of a `CompressionPolicy` for this model, instead of a selector.
        budget: for a policy, "frames" or "video", as in `compress`.
        max_num_frames: frames per video, >= 1, spread evenly over its time; a shorter one gives all it has.
        dtype: of the model, such as "float32"; by default as it is stored.
        attn_implementation: of transformers.
        batch_size: prompts at a time, >= 1, padded on the left.
        device: by default the first GPU; with several processes each takes its own.

    Raises:
        ValueError: an unknown or missing argument, or one that breaks its rule; a task that asks for what a chat
            model of videos cannot give.
        UserError: a file of a task that is no readable video.

    Example:
        >>> from lmms_eval.models import get_model
        >>> def load(folder):
        ...     return get_model("cacovid").create_from_arg_string(f"pretrained={folder},keep_ratio=0.1")
    """

    is_simple = False  # takes the messages of a task, not its text and visuals apart

    def __init__(
        self,
        pretrained: str | None = None,
        keep_ratio: float | None = None,
        num_tokens: int | None = None,
        selector: str | None = None,
        policy: str | None = None,
        budget: str | None = None,
        max_num_frames: int = 32,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: Any = None,  # lmms-eval passes it on; batches here are never sized automatically
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{OP}: unknown argument {sorted(unknown)[0]}; the arguments are {list(_ARGUMENTS)}.")
        if pretrained is None:
            raise ValueError(f"{OP}: pretrained is missing. Pass --model_args pretrained=NAME,keep_ratio=0.1.")
        for name, count in (("batch_size", batch_size), ("max_num_frames", max_num_frames)):
            if not str(count).isdecimal() or int(count) < 1:
                raise ValueError(f"{OP}: {name}={count}, it must be a whole number >= 1.")
        self.selector = _selector(selector, policy)
        self.counts: dict[str, Any] = {"keep_ratio": keep_ratio, "num_tokens": num_tokens, "budget": budget}
        check_selector(self.selector, keep_ratio, num_tokens, budget, {})

        self.accelerator = Accelerator()
        alone = self.accelerator.num_processes == 1
        self._device = torch.device(device) if device and alone else self.accelerator.device
        model: Any = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self._device).eval()
        self.adapter = adapter_of(self.model)
        if isinstance(self.selector, CompressionPolicy):
            self.selector.to(self._device, self.model.dtype)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = int(batch_size)
        self.max_num_frames = int(max_num_frames)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests.

        Args:
            requests: `Instance`s of chat tasks; `args` of each are the context, the function from a document to
                messages, the generation settings, the document's number, the task and the split.

        Returns:
            One `GenerationResult` per request, in their order; its `input_tokens` are those left after compression.
        """
        answers: list[Any] = [None] * len(requests)
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for numbers in self._batches(requests):
            contexts, to_messages, settings, docs, tasks, splits = zip(
                *(requests[i].args for i in numbers), strict=True
            )
            messages = [
                function(self.task_dict[task][split][doc])
                for function, doc, task, split in zip(to_messages, docs, tasks, splits, strict=True)
            ]
            batch = read(messages, self.max_num_frames)
            for i, context, answer in zip(numbers, contexts, self._answer(batch, settings[0]), strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", (context, settings[0]), answer.text)
            progress.update(len(numbers))
        progress.close()
        return answers

    def loglikelihood(self, requests: Any) -> Any:
        """Refused."""
        raise NotImplementedError(f"{OP}: gives no likelihoods. Use tasks with output_type generate_until.")

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Refused."""
        raise NotImplementedError(f"{OP}: answers one round. Use tasks with output_type generate_until.")

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Numbers of requests that run together: a batch has one way to generate."""
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[2]), []).append(i)
        for numbers in alike.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    @torch.inference_mode()
    def _answer(self, batch: Conversations, settings: dict[str, Any]) -> list[Any]:
        inputs = self._inputs(batch)
        generation = _generation(settings, self.processor.tokenizer.pad_token_id)
        run = compress(self.model, self.selector, **self.counts) if batch.videos else nullcontext()
        with run as compression:
            ids = self.model.generate(**inputs, **generation)
        prompts: Any = inputs if compression is None else compression.inputs
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        given = prompts["attention_mask"].sum(1).tolist()
        written = (new != generation["pad_token_id"]).sum(1).tolist()
        return [
            GenerationResult(text, TokenCounts(input_tokens=i, output_tokens=o))
            for text, i, o in zip(texts, given, written, strict=True)
        ]

    def _inputs(self, batch: Conversations) -> dict[str, Any]:
        """What `generate` takes: ids, masks and pixels from the processor."""
        options: dict[str, Any] = {"padding": True}
        if batch.videos:
            options |= {"do_sample_frames": False, "video_metadata": batch.videos}
        inputs = dict(
            self.processor.apply_chat_template(
                batch.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            ).to(self._device, self.model.dtype)
        )
        if batch.videos and isinstance(self.adapter, TiledAdapter):
            if batch.images:
                raise ValueError(
                    f"{OP}: {self.adapter.family} cannot tell {batch.images} images from the frames beside them. Use "
                    f"batch_size=1, and tasks without both in one prompt."
                )
            inputs["visuals"] = [("video", len(video["frames_indices"])) for video in batch.videos]
        return inputs


def _selector(name: str | None, policy: str | None) -> Selector:
    if policy is not None:
        if name is not None:
            raise ValueError(f"{OP}: selector={name} and policy={policy} are both given. Leave one out.")
        return CompressionPolicy.from_pretrained(policy).eval()
    name = name or "divprune"
    if name not in SELECTORS:
        raise ValueError(f"{OP}: selector={name}, it must be one of {list(SELECTORS)}, or pass policy=FOLDER.")
    return SELECTORS[name]


def _generation(settings: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """Arguments of `generate` from the generation settings of a task."""
    samples = bool(settings.get("temperature"))
    names = ("temperature", "top_p", "top_k") if samples else ()
    return {
        "max_new_tokens": settings.get("max_new_tokens", 1024),
        "pad_token_id": pad_token_id,
        "num_beams": settings.get("num_beams") or 1,
        "do_sample": samples,
        **{name: settings[name] for name in names if settings.get(name) is not None},
    }
