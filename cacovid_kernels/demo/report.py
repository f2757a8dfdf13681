"""What the demo shows on the terminal: progress, one table, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

if TYPE_CHECKING:
    from cacovid_kernels.demo.meter import Cost
    from cacovid_kernels.demo.pipeline import Result

STAGES = ("decode video", "vision tower", "score", "select", "gather", "prefill", "decode")


class Progress:
    """One line on stderr for the running stage, with a bar if its length is known; silent off a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        live = self.console.is_terminal
        with Bars(*columns, console=self.console, transient=True, refresh_per_second=4, disable=not live) as bars:
            task = bars.add_task(name, total=None)
            yield lambda fraction: bars.update(task, total=1.0, completed=fraction)


def table(result: Result) -> Table:
    """Full prompt against compressed: tokens, then time and peak memory of every stage."""
    page = Table(title="full prompt against compressed", title_justify="left", title_style="bold")
    page.add_column("")
    for column in ("full", "compressed", "ratio", "peak MiB\nfull", "peak MiB\ncompressed"):
        page.add_column(column, justify="right")
    video = (result.selection.num_tokens, sum(result.selection.lengths))
    prompt = (result.prompt_tokens["full"], result.prompt_tokens["compressed"])
    cache = (result.cache_bytes["full"] / 2**20, result.cache_bytes["compressed"] / 2**20)
    page.add_row("video tokens", f"{video[0]:,}", f"{video[1]:,}", _ratio(*video))
    page.add_row("prompt tokens", f"{prompt[0]:,}", f"{prompt[1]:,}", _ratio(*prompt))
    page.add_row("KV cache, MiB", f"{cache[0]:,.1f}", f"{cache[1]:,.1f}", _ratio(*cache), end_section=True)

    totals = [0.0, 0.0]
    for stage in STAGES:
        shared = result.costs.get(("both", stage))
        full, short = (shared or result.costs.get((run, stage)) for run in ("full", "compressed"))
        totals[0] += full.ms if full else 0
        totals[1] += short.ms if short else 0
        ratio = _ratio(full.ms, short.ms) if full and short and not shared else ""
        page.add_row(
            f"{_label(stage, result)}, ms", _ms(full), _ms(short), ratio, _mib(full), _mib(short),
            end_section=stage == STAGES[-1],
        )  # fmt: skip
    page.add_row("total, ms", f"{totals[0]:,.1f}", f"{totals[1]:,.1f}", _ratio(*totals))
    return page


def notes(result: Result) -> list[str]:
    """What the table does not say, one line each."""
    found, options, clip = result.agreement, result.options, result.clip
    lines = []
    if len(clip.frames) < options.num_frames and not options.in_world:
        lines.append(f"frames: {len(clip.frames)} instead of {options.num_frames}; {clip.name} holds no more.")
    lines += [
        f"check: {'right' if found.holds else 'WRONG'}, logits differ by at most {found.largest:.1e} from "
        f"the full-length run with the dropped tokens masked (allowed: {found.tolerance:.1e}).",
        f"  kept positions {found.kept_positions:.1e}, generated tokens {found.generated:.1e}, largest logit "
        f"{found.largest_logit:.1f}; with renumbered positions it would be {found.renumbered:.1e}.",
        f"time: best of {options.repeats}; video and vision tower once, for both runs.",
        f"memory: {result.memory_method}.",
    ]
    if result.options.is_random:
        lines.append("model: tiny and random, so its answers mean nothing; sizes, times and the check do.")
    else:
        lines.append(f"question: {result.scene.question}")
        lines += [f"answer, {run} prompt: {answer}" for run, answer in result.answers.items()]
        if result.scene.truth:
            lines.append(f"the right answer: {result.scene.truth}")
    if options.policy is None and not options.in_world:
        lines.append("policy: random heads, so the choice of tokens means nothing; --policy loads a trained one.")
    return lines


def _label(stage: str, result: Result) -> str:
    if stage != "decode":
        return stage
    # The first token comes out of the prefill.
    full, short = (len(result.generated[run]) - 1 for run in ("full", "compressed"))
    return f"decode {full} token{'s' * (full != 1)}" if full == short else f"decode {full} | {short} tokens"


def _ratio(full: float, compressed: float) -> str:
    return f"{full / compressed:.1f}x" if compressed else ""


def _ms(cost: Cost | None) -> str:
    return f"{cost.ms:,.1f}" if cost else "-"


def _mib(cost: Cost | None) -> str:
    return "-" if cost is None or cost.peak_mib is None else f"{cost.peak_mib:,.1f}"
