"""A Video-LLM from its vision features on: prefill, first token, decoding, memory, and what choosing tokens costs.

32 frames of 196 tokens and 40 tokens of text go through two layers of the width of LLaVA-OneVision 0.5B. What its 24
layers and its vision tower would take is computed from layers of that size timed here; those rows say so.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from baselines.generate import LAYERS, Prompt
from torch.profiler import ProfilerActivity, profile
from transformers import SiglipVisionConfig, SiglipVisionModel

from cacovid_kernels.compressors import divprune
from cacovid_kernels.integrations.transformers import context

FULL = "full prompt"
REAL_LAYERS, TOWER_LAYERS, FRAMES = 24, 26, 32
LIMIT = 0.02  # of the time to the first token, at 10%


@lru_cache(maxsize=1)
def prompt() -> Prompt:
    return Prompt(FRAMES)


def selector(name: str) -> Any:
    return {"policy": prompt().policy, "divprune": divprune}[name]


@pytest.mark.parametrize("percent", [100, 25, 10])
def bench_prefill(race, percent):
    """The language model alone, embeddings in, one row of logits out."""
    arguments = prompt().arguments(percent / 100)
    groups = [f"prefill, {p}% kept" for p in (25, 10) if percent in (100, p)]
    race(groups, FULL if percent == 100 else "ours", prompt().prefill, [(arguments,)])


@pytest.mark.parametrize("name", [FULL, "policy", "divprune"])
def bench_first_token(race, name):
    groups = [f"first token, {choice} keeps 10%" for choice in ("policy", "divprune") if name in (FULL, choice)]
    if name == FULL:
        race(groups, FULL, prompt().first_token, [()])
    else:
        race(groups, "ours", prompt().first_token, [(selector(name), 0.1)])


@pytest.mark.parametrize("percent", [100, 10])
def bench_decode(race, percent):
    cache = prompt().prefill(prompt().arguments(percent / 100)).past_key_values
    contestant = FULL if percent == 100 else "ours"
    race("16 further tokens, 10% kept", contestant, prompt().decode, [(cache, 16)])


def bench_memory(record):
    """Bytes that follow from shapes alone: the cache, and how many more a first token holds at its peak than before."""
    caches = [prompt().prefill(prompt().arguments(share)).past_key_values for share in (1.0, 0.1)]
    full, kept = (sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) for cache in caches)
    record("bytes of the cache, 10% kept", ratios={FULL: full / kept})
    full = peak_bytes(prompt().first_token)
    for name in ("policy", "divprune"):
        ours = peak_bytes(lambda name=name: prompt().first_token(selector(name), 0.1))
        record(f"peak of tensor bytes to the first token, {name} keeps 10%", ratios={FULL: full / ours})


def peak_bytes(call: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class Parts:
    """Seconds that some functions take in all while others that call them run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.seconds = monkeypatch, defaultdict[str, float](float)

    def watch(self, part: str, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        self.monkeypatch.setattr(owner, name, timed)

    def of(self, call: Callable[[], Any], rounds: int = 3) -> dict[str, float]:
        """Medians, with the whole call as "all"."""
        found = defaultdict(list)
        for turn in range(rounds + 1):
            self.seconds.clear()
            start = time.perf_counter()
            call()
            self.seconds["all"] = time.perf_counter() - start
            for part, seconds in self.seconds.items() if turn else ():  # the first warms up
                found[part].append(seconds)
        return {part: statistics.median(seconds) for part, seconds in found.items()}


def tower_seconds(parts: Parts) -> float:
    """Of the real vision tower over all frames, from two of its layers over one."""
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=2, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    tower = SiglipVisionModel(config).eval().requires_grad_(False)
    pixels = torch.randn(1, 3, 384, 384)
    return parts.of(lambda: tower(pixel_values=pixels), 5)["all"] / 2 * TOWER_LAYERS * FRAMES


def bench_selection(record, monkeypatch):
    """Everything between the features and the language model that the full prompt does not need."""
    parts = Parts(monkeypatch)
    parts.watch("selection", context, "choose")
    parts.watch("selection", context, "compact")
    parts.watch("network", prompt().policy, "forward")
    parts.watch("model", prompt().model.model.language_model, "forward")
    tower = tower_seconds(parts)

    def of_real_depth(found: dict[str, float]) -> float:
        return found["all"] + found["model"] * (REAL_LAYERS / LAYERS - 1)

    full = of_real_depth(parts.of(prompt().first_token, 2))
    for name in ("policy", "divprune"):
        found = parts.of(lambda name=name: prompt().first_token(selector(name), 0.1))
        selection, deep = found["selection"], of_real_depth(found)
        shares = {
            f"{LAYERS} layers": selection / found["all"],
            f"{REAL_LAYERS} layers, computed": selection / deep,
            f"{REAL_LAYERS} layers and vision tower, computed": selection / (deep + tower),
        }
        if name == "policy":
            shares |= {f"{LAYERS} layers, without the policy's network": (selection - found["network"]) / found["all"]}
        record(f"selection, {name} keeps 10%", shares=shares, limits=dict.fromkeys(shares, LIMIT))
        ratios = {FULL: full / deep, f"{FULL}, vision tower counted in both": (full + tower) / (deep + tower)}
        record(f"first token of {REAL_LAYERS} layers, computed, {name} keeps 10%", ratios=ratios)
