"""Markdown tables of what was measured in the world."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cacovid_kernels.demo.world.evaluate import ALL, Score
from cacovid_kernels.demo.world.questions import KINDS
from cacovid_kernels.training.config import SAMPLERS


def main_table(scores: Sequence[Score]) -> str:
    """Right answers in percent, with 95 % intervals, one row per rule and one column per share of tokens."""
    ratios = sorted({score.ratio for score in scores if score.rule != ALL}, reverse=True)
    whole = next(score for score in scores if score.rule == ALL)
    tokens = [next(s.tokens for s in scores if s.ratio == ratio) for ratio in ratios]
    heads = [f"{100 * ratio:g} % ({count})" for ratio, count in zip(ratios, tokens, strict=True)]
    lines = [
        f"{ALL} ({whole.tokens}): **{_percent(whole)}**",
        "",
        f"| rule | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * len(ratios),
    ]
    for rule in dict.fromkeys(score.rule for score in scores if score.rule != ALL):
        cells = [_percent(next(s for s in scores if (s.rule, s.ratio) == (rule, ratio))) for ratio in ratios]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kinds_table(scores: Sequence[Score], ratio: float) -> str:
    """One share of tokens: right answers by kind of question, what is left of the full accuracy, the named object."""
    whole = next(score for score in scores if score.rule == ALL)
    lines = [
        f"| rule | {' | '.join(KINDS)} | mean | of all tokens' | kept tokens on the object | its tokens found |",
        "| --- |" + " ---: |" * (len(KINDS) + 4),
    ]
    for score in (whole, *(s for s in scores if s.rule != ALL and s.ratio == ratio)):
        kinds = [f"{100 * right / asked:.1f}" for right, asked in zip(score.right, score.asked, strict=True)]
        left = 100 * score.share / whole.share
        lines.append(
            f"| {score.rule} | {' | '.join(kinds)} | {100 * score.share:.1f} | {left:.1f} % "
            f"| {100 * score.on_named:.1f} % | {100 * score.named_found:.1f} % |"
        )
    return "\n".join(lines)


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} ± {50 * (high - low):.1f}"


def samplers_table(runs: Sequence[dict[str, Any]]) -> str:
    """Where the runs ended: mean over the seeds, and the smallest and largest of them."""
    lines = [
        "| tokens kept | sampler | seeds | reward of the last draws | accuracy of the best tokens |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for ratio in sorted({run["ratio"] for run in runs}):
        for sampler in SAMPLERS:
            mine = [run for run in runs if (run["ratio"], run["sampler"]) == (ratio, sampler)]
            if mine:
                ends = [[100 * run[curve][-1][1] for run in mine] for curve in ("reward", "accuracy")]
                cells = [f"{statistics.mean(e):.1f} ({min(e):.1f} to {max(e):.1f})" for e in ends]
                lines.append(f"| {100 * mine[0]['kept']:.1f} % | {sampler} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)
