"""Tables and plots of what was measured in the world: `python -m cacovid_kernels.demo.world.report FOLDER`.

Reads `compression.json` (of `evaluate`), `samplers.jsonl` (of `study`) and `policy_training.jsonl` (of a training run,
see `--log`) in the folder, and writes a Markdown page and PNGs beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from cacovid_kernels.demo.world import MODEL, POLICY
from cacovid_kernels.demo.world.evaluate import ALL, TRAINED, UNTRAINED, Score
from cacovid_kernels.demo.world.study import study_config
from cacovid_kernels.demo.world.tables import kinds_table, main_table, samplers_table
from cacovid_kernels.training.config import SAMPLERS, TrainConfig

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})

COLOURS = {  # the rules of the plot; Okabe and Ito's colours, which colour-blind eyes tell apart
    TRAINED: "#d55e00",
    UNTRAINED: "#999999",
    "random": "#56b4e9",
    "uniform": "#0072b2",
    "attention (FastV)": "#009e73",
    "diversity (DivPrune)": "#cc79a7",
    "frame difference (EVS)": "#e69f00",
    "centre distance (VidCom2)": "#000000",
}
RATIOS = ("keep_ratio", "min_keep_ratio", "max_keep_ratio")
SAMPLER_COLOURS = {"combinations": "#0072b2", "gumbel": "#e69f00", "gumbel_video": "#d55e00"}


def plot_compression(scores: Sequence[Score], path: Path) -> None:
    """Right answers against the share of tokens kept, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    whole = next(score for score in scores if score.rule == ALL)
    axes.axhline(100 * whole.share, color="#444444", linewidth=0.8, linestyle="--")
    axes.annotate("all tokens", (2, 100 * whole.share), xytext=(0, 3), textcoords="offset points", color="#444444")
    for rule, colour in COLOURS.items():
        mine = sorted((s for s in scores if s.rule == rule), key=lambda s: s.ratio)
        if mine:
            x, y = [100 * s.ratio for s in mine], [100 * s.share for s in mine]
            ends = [[abs(v - 100 * s.interval[i]) for v, s in zip(y, mine, strict=True)] for i in (0, 1)]
            wide = 2.2 if rule == TRAINED else 1.1
            axes.errorbar(x, y, ends, color=colour, linewidth=wide, marker="o", markersize=3, capsize=2, label=rule)
    axes.set(xscale="log", xlabel="tokens kept, %", ylabel="right answers, %", ylim=(0, 104))
    ticks = sorted({100 * score.ratio for score in scores if score.rule != ALL})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    plt.close(figure)


def thinned(log: str, size: int = 20) -> str:
    """Means over every `size` steps of a training log, one JSON line each."""
    lines = [json.loads(line) for line in log.splitlines()]
    means = []
    for first in range(0, len(lines), size):
        part = lines[first : first + size]
        names = [name for name in part[0] if name != "step" and all(name in line for line in part)]
        mean = {name: float(f"{statistics.fmean(line[name] for line in part):.4g}") for name in names}
        means.append(json.dumps({"step": part[-1]["step"], **mean}) + "\n")
    return "".join(means)


def plot_training(policy: Sequence[dict[str, Any]], path: Path) -> None:
    """Answers of the model while it was trained, and reward and undecidedness while the policy was."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    log = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["log"]
    for name, colour in (("all", "#d55e00"), ("evidence 10%", "#009e73"), ("random 10%", "#56b4e9")):
        left.plot([r["step"] for r in log], [100 * r[name]["mean"] for r in log], color=colour, label=name)
    left.set(title="the frozen model, from scratch", xlabel="step", ylabel="right answers, %", ylim=(0, 102))
    steps = [r["step"] for r in policy]
    right.plot(steps, [100 * r["reward/token"] for r in policy], color="#d55e00", label="reward of token draws")
    right.plot(steps, [100 * r["reward/frame"] for r in policy], color="#0072b2", label="reward of frame draws")
    right.plot(steps, [100 * r["entropy"] for r in policy], color="#999999", label="entropy of a frame's scores")
    right.set(title="the policy", xlabel="step", ylabel="%", ylim=(0, 102))
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def plot_samplers(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward of the draws and accuracy of the best tokens over training: mean of the seeds, and their range."""
    ratios = sorted({run["ratio"] for run in runs})
    figure, axes = plt.subplots(
        2, len(ratios), figsize=(3.2 * len(ratios), 5.2), layout="constrained", sharey=True, squeeze=False
    )
    for column, ratio in enumerate(ratios):
        for row, (curve, title) in enumerate(
            (("reward", "reward of the draws"), ("accuracy", "accuracy, best tokens"))
        ):
            for sampler, colour in SAMPLER_COLOURS.items():
                found = [run[curve] for run in runs if (run["ratio"], run["sampler"]) == (ratio, sampler)]
                if found:
                    steps = [step for step, _ in found[0]]
                    values = [[100 * one[i][1] for one in found] for i in range(len(steps))]
                    axes[row, column].plot(steps, [statistics.mean(v) for v in values], color=colour, label=sampler)
                    axes[row, column].fill_between(
                        steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0
                    )
            kept = next(run["kept"] for run in runs if run["ratio"] == ratio)
            axes[row, column].set(title=f"{title}, {100 * kept:.1f} % kept", xlabel="step", ylim=(0, 100))
    axes[0, 0].set_ylabel("%")
    axes[1, 0].set_ylabel("%")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def differences(config: TrainConfig, *without: str) -> str:
    """What a run sets otherwise than the trainer's defaults, which stand in brackets."""
    without += ("data", "model", "output", "max_steps", "save_every", "keep_checkpoints", "seed")
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(TrainConfig())
    changed = [name for name in values if values[name] != defaults[name] and name not in without]
    return ", ".join(f"`{name}` {_plain(values[name])} ({_plain(defaults[name])})" for name in changed)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def training_caption(policy: Sequence[dict[str, Any]]) -> str:
    """What the curves of training show, and what is different from the published training."""
    config = TrainConfig.from_file(POLICY / "training.json")
    start, end = policy[0], policy[-10:]
    ends = {name: 100 * statistics.fmean(line[name] for line in end) for name in ("reward/frame", "reward/content")}
    first = {name: 100 * start[name] for name in ("reward/frame", "reward/content", "kept_ratio")}
    return (
        "Left: the frozen model's answers to held-out questions from all tokens, from 10 % at random, and from 10 % "
        f"with the evidence among them. Right: the policy, `policy/training.json`, {config.max_steps:,} steps of "
        f"{config.batch_size} questions. Settings that are not the trainer's defaults, which stand in brackets: "
        f"{differences(config)}. (The published sampler is `combinations`.) The entropy is that of the softmax of a "
        "frame's token scores, the mean over the frames, in percent of the entropy of equal scores. The tokens inside "
        "drawn frames are density peaks, in whose choice the policy has no part: draws of frames earn "
        f"{first['reward/frame']:.0f} % in the first {start['step']} steps and {ends['reward/frame']:.0f} % in the "
        f"last {start['step'] * len(end)}, density peaks of all frames {first['reward/content']:.0f} % and "
        f"{ends['reward/content']:.0f} %, while the share of tokens that is drawn falls from "
        f"{first['kept_ratio']:.1f} % to {100 * end[-1]['kept_ratio']:.1f} %."
    )


def main() -> int:
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(prog="python -m cacovid_kernels.demo.world.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--log", type=Path, metavar="FILE", help="a run's log.jsonl, thinned first")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.log:
        (folder / "policy_training.jsonl").write_text(thinned(arguments.log.read_text(encoding="utf-8")))
    record = json.loads((folder / "compression.json").read_text(encoding="utf-8"))
    scores = [Score(**score) for score in record["scores"]]
    policy = [json.loads(line) for line in (folder / "policy_training.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = [json.loads(line) for line in (folder / "samplers.jsonl").read_text(encoding="utf-8").splitlines()]
    plot_compression(scores, folder / "compression.png")
    plot_training(policy, folder / "training.png")
    plot_samplers(runs, folder / "samplers.png")
    steps = sorted({run["steps"] for run in runs})
    parts = [
        "# Results in the procedural world",
        f"Made by `make results`. Right answers in percent of {record['questions']:,} questions on videos that "
        f"neither the model nor the policy has seen (world seed {record['world_seed']}), ± half of the 95 % Wilson "
        "interval; in brackets the tokens kept. Every rule keeps the same number, at their original positions.",
        "![Right answers against tokens kept](compression.png)",
        main_table(scores),
        "Shares are rounded to whole tokens here, 29 of 288 at 10 %; the library's `keep_ratio=0.1` keeps the whole "
        "part, 28.",
        "The frozen model was trained from scratch with tokens dropped: what stayed was random, but the evidence for a "
        "random part of the questions stayed before all else. A further loss pointed the attention of its third layer "
        "at the evidence, so what that layer's attention finds here is built in.",
        "EVS keeps the whole first frame before anything else, which is more than 10 % of eight frames; the row "
        '"frame difference, any frame" leaves that out. FastV reads the second layer, as published; '
        '"one layer later" reads the third, after three quarters of the whole prompt\'s work. "evidence first" knows '
        "the truth and fills up at random.",
    ]
    for ratio in (0.1, 0.05):
        parts += [f"## By kind of question, {100 * ratio:g} % of the tokens", kinds_table(scores, ratio)]
    parts += [
        "## Training",
        "![Curves of training](training.png)",
        training_caption(policy),
        "## Samplers",
        f"Policies trained for {' or '.join(map(str, steps))} steps of 16 questions with 16 combinations each; "
        "`python -m cacovid_kernels.demo.world.study`. Mean, and range over the seeds. This is not the published "
        "training: no replay, no draws of frames or content, always the same number of tokens. Against the trainer's "
        f"defaults: {differences(study_config(SAMPLERS[0], 0.1, 0, 1, ''), 'sampler', *RATIOS)}. Accuracy is that of "
        "the best tokens of the whole video for every sampler.",
        "![Curves of the samplers](samplers.png)",
        samplers_table(runs),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote README.md, compression.png, training.png and samplers.png to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
