"""Renders the tables between `<!-- results:NAME -->` and `<!-- end -->` of README.md from bench/results/NAME.jsonl."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def table(name: str) -> str:
    """Markdown table of one results file: a line per op, shape and baseline."""
    path = ROOT / "bench" / "results" / f"{name}.jsonl"
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    lines = ["| op | baseline | ratio | aim |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        for baseline, ratio in row["ratios"].items():
            aim = row["targets"].get(baseline)
            lines.append(f"| {row['group']} | {baseline} | {ratio:.2f}x | {'' if aim is None else f'{aim:g}x'} |")
    source = f"commit {header['commit']}, torch {header['torch']}, {header['cpu_isa']}, {header['threads']} thread"
    return "\n".join([*lines, "", f"[bench/results/{name}.jsonl](bench/results/{name}.jsonl): {source}."])


def render(text: str) -> str:
    """README text with every results table made anew."""
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in sys.argv:
        sys.exit("README.md is not what bench/results says. Run: python bench/readme.py" if after != before else 0)
    readme.write_text(after)
