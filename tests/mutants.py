"""Lists of known bugs, and the table of which of them the tests found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

TIMEOUT = 600  # seconds: a mutant may loop for ever


@dataclass(frozen=True)
class Mutant:
    """One bug: what replaces what in which file, and the check that has to notice."""

    family: str
    name: str
    file: str
    old: str
    new: str
    check: str

    def plant(self, folder: Path) -> str:
        """Applies the bug to the copy in `folder`; returns why that is impossible, or an empty string."""
        path = folder / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            return f"the text occurs {text.count(self.old)} times in {self.file}"
        path.write_text(text.replace(self.old, self.new))
        return ""


def listed(path: Path, key: str, default: str, each: int | None = None) -> list[Mutant]:
    """The mutants of a file, or `each` of them, evenly chosen; `key` names the check, `default` where it is absent."""
    entries = tomllib.loads(path.read_text())["mutant"]
    count = min(each or len(entries), len(entries))
    chosen = [entries[i * len(entries) // count] for i in range(count)]
    return [Mutant(path.stem, check=entry.pop(key, default), **entry) for entry in chosen]


def parse_arguments(description: str, lists: Path) -> tuple[argparse.Namespace, list[Path]]:
    """The command line, and the lists that it names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("families", nargs="*", help="only these lists")
    parser.add_argument("--each", type=int, metavar="N", help="only N of each list, evenly chosen")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    paths = [path for path in sorted(lists.glob("*.toml")) if path.stem in (options.families or [path.stem])]
    return options, paths


def verdict(mutant: Mutant | None, problem: str, run: Callable[[], int]) -> tuple[str, float]:
    """ "killed" or what is wrong, and seconds; without a mutant "passes" or what is wrong.

    `run` returns 0 where all tests passed and 1 where the bug was noticed.
    """
    start = time.perf_counter()
    status = None if problem else run()
    if mutant is None:
        result = "passes" if status == 0 else f"FAILS WITHOUT A MUTANT ({problem or f'status {status}'})"
    else:
        result = problem or {0: "SURVIVES", 1: "killed"}.get(status or 0, f"ended with status {status}")
    return result, time.perf_counter() - start


def report(results: Iterable[tuple[Mutant | None, str, str, float]]) -> int:
    """Prints a line for every (mutant or none, check, verdict, seconds); returns the exit status."""
    mutants, checks, wrong = 0, 0, 0
    for mutant, check, result, seconds in results:
        name = f"{mutant.family}: {mutant.name}" if mutant else check
        print(f"{name:72} {seconds:6.1f} s  {result}", flush=True)
        mutants, checks = mutants + (mutant is not None), checks + (mutant is None)
        wrong += result not in ("killed", "passes")
    print(f"{mutants} mutants, {checks} checks without one, {wrong} wrong")
    return 1 if wrong or not mutants else 0
