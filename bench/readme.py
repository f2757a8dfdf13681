"""Renders bench/results/NAME.jsonl: all of it as bench/results/NAME.md, the rows with an aim into README.md.

The README's tables stand between `<!-- results:NAME -->` and `<!-- end -->`, whole ones in docs/integrations.md too;
that of docs/results/compression.json between `<!-- world -->` and `<!-- end -->`. With `--check` nothing is written and
the exit code says whether all are what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def table(name: str, with_aim_only: bool) -> str:
    """Markdown table of one results file: a line per op, shape and baseline."""
    header, *rows = (json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines())
    lines = ["| op | baseline | ratio | aim |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        for baseline, ratio in row["ratios"].items():
            aim = row["targets"].get(baseline)
            if aim is None and with_aim_only:
                continue
            verdict = "" if aim is None else f"{aim:g}x" if ratio >= aim else f"{aim:g}x, missed"
            lines.append(f"| {row['group']} | {baseline} | {ratio:.2f}x | {verdict} |")
        for part, share in row.get("shares", {}).items():
            limit = row["limits"][part]
            verdict = f"below {limit:.0%}{'' if share < limit else ', missed'}"
            lines.append(f"| {row['group']} | share of the first token, {part} | {100 * share:.2g}% | {verdict} |")
    source = f"commit {header['commit']}, torch {header['torch']}, {header['cpu_isa']}, {header['threads']} thread"
    return "\n".join([*lines, "", f"From [bench/results/{name}.jsonl](/bench/results/{name}.jsonl): {source}."])


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
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.S)
    world = re.compile(r"(<!-- world -->\n).*?(<!-- end -->)", re.S)
    files = {}
    for page, with_aim_only in ((ROOT / "README.md", True), (ROOT / "docs" / "integrations.md", False)):
        text = page.read_text()
        rest = pattern.sub(lambda m, only=with_aim_only: f"{m[1]}{table(m[2], only)}\n{m[3]}", text)
        files[page] = world.sub(lambda m: f"{m[1]}{world_table()}\n{m[2]}", rest)
        for _, name, _ in pattern.findall(text):
            files[RESULTS / f"{name}.md"] = f"# Every ratio of one run\n\n{table(name, False)}\n"
    return files


if __name__ == "__main__":
    for path, text in rendered().items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what bench/results says. Run: python bench/readme.py")
