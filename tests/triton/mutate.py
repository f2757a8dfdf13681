"""Plants known bugs in copies of the package and checks that the tests find each of them.

    python tests/triton/mutate.py [family ...] [--each N] [--jobs 2]

`mutants/<family>.toml` lists what to replace by what in which file, and which tests have to notice (by default
test_triton_<family>.py). Prints a table; exits with 1 if a mutant survives or a list no longer fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mutants import TIMEOUT, Mutant, listed, parse_arguments, report, verdict  # noqa: E402

ROOT = HERE.parents[1]
PACKAGE = "cacovid_kernels"


def run_tests(folder: Path, tests: str) -> int:
    """Exit status of pytest with the package in `folder`: 0 all passed, 1 some failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", str(HERE / tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return 1


def examine(mutant: Mutant | None, tests: str) -> tuple[Mutant | None, str, str, float]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        problem = mutant.plant(folder) if mutant else ""
        return mutant, tests, *verdict(mutant, problem, lambda: run_tests(folder, tests))


def main() -> int:
    options, paths = parse_arguments((__doc__ or "").splitlines()[0], HERE / "mutants")
    mutants = [m for path in paths for m in listed(path, "tests", f"test_triton_{path.stem}.py", options.each)]
    work: list[tuple[Mutant | None, str]] = [(None, tests) for tests in sorted({m.check for m in mutants})]
    work += [(m, m.check) for m in mutants]
    with ThreadPoolExecutor(options.jobs) as pool:
        return report(pool.map(lambda item: examine(*item), work))


if __name__ == "__main__":
    sys.exit(main())
