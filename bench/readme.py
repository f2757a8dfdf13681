"""Renders bench/results/NAME.jsonl: all of it as bench/results/NAME.md, some rows into README.md.

The README's tables stand between `<!-- results:NAME -->` and `<!-- end -->`, whole ones in docs/integrations.md too;
that of docs/results/compression.json between `<!-- world -->` and `<!-- end -->`. With `--check` nothing is written and
the exit code says whether all are what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
WHOLE_MODEL = "first token of 24 layers, computed, policy keeps 10%"
SHORT = {  # where the README shows rows (group, baseline), not a summary
    "generate": (
        (WHOLE_MODEL, "full prompt"),
        (WHOLE_MODEL, "full prompt, vision tower counted in both"),
        ("bytes of the cache, 10% kept", "full prompt"),
    )
}


class Row(NamedTuple):
    """One line of a table."""

    group: str
    baseline: str
    value: str
    verdict: str = ""
    ratio: float = 0.0


def two_digits(ratio: float) -> str:
    """Two significant digits below 10, integers above: one ratio moves by tens of percent between runs."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:#.2g}".rstrip(".") + "x"


def read(name: str) -> tuple[list[Row], str]:
    """Rows of one results file, by group and baseline, and where they come from. Aims meet the unrounded ratios."""
    header, *groups = (json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines())
    rows = []
    for group in groups:
        for baseline, ratio in group["ratios"].items():
            aim = group["targets"].get(baseline)
            verdict = f"{aim:g}x{'' if ratio >= aim else ', missed'}" if aim else ""
            rows.append(Row(group["group"], baseline, two_digits(ratio), verdict, ratio))
        for part, share in group.get("shares", {}).items():
            limit = group["limits"][part]
            verdict = f"below {limit:.0%}{'' if share < limit else ', missed'}"
            rows.append(Row(group["group"], f"share of the first token, {part}", f"{100 * share:.2g}%", verdict))
    source = f"commit {header['commit']}, torch {header['torch']}, {header['cpu_isa']}, {header['threads']} thread"
    return rows, f"From [bench/results/{name}.jsonl](/bench/results/{name}.jsonl): {source}."


def summary(rows: Sequence[Row], source: str) -> str:
    """Markdown: of every op its first group, against the slowest and the fastest baseline, and all aims it missed.

    An op is the first word of its groups.
    """
    ops: dict[str, list[Row]] = {}
    for row in rows:
        ops.setdefault(row.group.split()[0], []).append(row)
    lines = ["| op | against the slowest | against the fastest | aims missed |", "| --- | ---: | ---: | ---: |"]
    for of_op in ops.values():
        first = sorted((row for row in of_op if row.group == of_op[0].group), key=lambda row: row.ratio)
        fastest, slowest = (f"{row.value} {row.baseline}" for row in (first[0], first[-1]))
        missed = {f"{row.verdict.split(',')[0]} {row.baseline}" for row in of_op if row.verdict.endswith("missed")}
        lines.append(f"| {of_op[0].group} | {slowest} | {fastest} | {'; '.join(sorted(missed))} |")
    return "\n".join([*lines, "", source])


def table(rows: Sequence[Row], source: str) -> str:
    """Markdown."""
    aims = any(row.verdict for row in rows)
    lines = ["| op | baseline | ratio |" + " aim |" * aims, "| --- | --- | ---: |" + " ---: |" * aims]
    lines += [f"| {row.group} | {row.baseline} | {row.value} |" + f" {row.verdict} |" * aims for row in rows]
    return "\n".join([*lines, "", source])


def world_table() -> str:
    """Right answers of the world's model by rule, without the rules that serve only to probe the world."""
    from cacovid_kernels.demo.world.evaluate import ALL, TRAINED, Score
    from cacovid_kernels.demo.world.tables import main_table

    record = json.loads((ROOT / "docs" / "results" / "compression.json").read_text())
    scores = [Score(**score) for score in record["scores"]]
    shown = (ALL, "random", "uniform", "attention (FastV)", "diversity (DivPrune)", "frame difference (EVS)",
             "centre distance (VidCom2)", "untrained policy", TRAINED)  # fmt: skip
    return main_table([score for score in scores if score.rule in shown])


def rendered() -> dict[Path, str]:
    """What every generated file has to hold."""
    results = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.S)
    world = re.compile(r"(<!-- world -->\n).*?(<!-- end -->)", re.S)
    files = {}
    for page, short in ((ROOT / "README.md", True), (ROOT / "docs" / "integrations.md", False)):
        text = page.read_text()
        tables = {}
        for _, name, _ in results.findall(text):
            rows, source = read(name)
            files[RESULTS / f"{name}.md"] = f"# Every ratio of one run\n\n{table(rows, source)}\n"
            if not short:
                tables[name] = table(rows, source)
            elif name in SHORT:
                tables[name] = table([next(row for row in rows if row[:2] == wanted) for wanted in SHORT[name]], source)
            else:
                tables[name] = summary(rows, source)
        text = results.sub(lambda m, tables=tables: f"{m[1]}{tables[m[2]]}\n{m[3]}", text)
        files[page] = world.sub(lambda m: f"{m[1]}{world_table()}\n{m[2]}", text)
    return files


if __name__ == "__main__":
    for path, text in rendered().items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what bench/results says. Run: python bench/readme.py")
