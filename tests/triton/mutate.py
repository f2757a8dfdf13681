"""Plants known bugs in copies of the package and checks that the tests find each of them.

    python tests/triton/mutate.py [family ...] [--each N] [--jobs 2]

`mutants/<family>.toml` lists what to replace by what in which file, and which tests have to notice (by default
test_triton_<family>.py). Prints a table; exits with 1 if a mutant survives or a list no longer fits the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = "cacovid_kernels"
TIMEOUT = 600  # seconds: a mutant may loop for ever


@dataclass(frozen=True)
class Mutant:
    family: str
    name: str
    file: str
    old: str
    new: str
    tests: str

    def plant(self, folder: Path) -> str:
        """Applies the bug to the copy in `folder`; returns why that is impossible, or an empty string."""
        path = folder / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            return f"the text occurs {text.count(self.old)} times in {self.file}"
        path.write_text(text.replace(self.old, self.new))
        return ""


def listed(families: list[str], each: int | None = None) -> list[Mutant]:
    """The mutants of the families, of all if none is named; `each` of every list, or all."""
    found = []
    for path in sorted((HERE / "mutants").glob("*.toml")):
        if families and path.stem not in families:
            continue
        entries = tomllib.loads(path.read_text())["mutant"]
        count = min(each or len(entries), len(entries))
        for entry in (entries[i * len(entries) // count] for i in range(count)):
            found.append(Mutant(path.stem, **{"tests": f"test_triton_{path.stem}.py", **entry}))
    return found


def run_tests(folder: Path, tests: str) -> int:
    """Exit status of pytest with the package in `folder`: 0 all passed, 1 some failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", str(HERE / tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return 1


def verdict(mutant: Mutant | None, tests: str) -> tuple[str, float]:
    """ "killed" or what is wrong, and seconds; without a mutant "passes" or what is wrong."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        problem = mutant.plant(folder) if mutant else ""
        status = None if problem else run_tests(folder, tests)
    if mutant is None:
        result = "passes" if status == 0 else f"TESTS FAIL WITHOUT A MUTANT (status {status})"
    else:
        result = problem or {0: "SURVIVES", 1: "killed"}.get(status or 0, f"pytest ended with status {status}")
    return result, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="only these lists")
    parser.add_argument("--each", type=int, metavar="N", help="only N of each list, evenly chosen")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    mutants = listed(options.families, options.each)
    work: list[tuple[Mutant | None, str]] = [(None, tests) for tests in sorted({m.tests for m in mutants})]
    work += [(m, m.tests) for m in mutants]
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (mutant, tests), (result, seconds) in zip(work, pool.map(lambda w: verdict(*w), work), strict=True):
            name = f"{mutant.family}: {mutant.name}" if mutant else tests
            print(f"{name:72} {seconds:6.1f} s  {result}", flush=True)
            wrong += result not in ("killed", "passes")
    print(f"{len(mutants)} mutants, {len(work) - len(mutants)} test files, {wrong} wrong")
    return 1 if wrong or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
