"""Plants known bugs in a copy of the CUDA kernels and checks that the tests or a sanitizer find each of them.

    python tests/cuda/mutate.py [family ...] [--each N] [--jobs 2]

`mutants/<family>.toml` lists what to replace by what in which file and who has to notice: "bits", the tests of
test_cuda_<family>.py on the emulated machine, or "thread" or "address", the C++ program of that name under this
sanitizer. Prints a table; exits with 1 if a mutant survives, does not compile or no longer fits the code. One bug is
built while the ones before it are tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import emulate  # noqa: E402
from mutants import TIMEOUT, Mutant, listed, parse_arguments, report, verdict  # noqa: E402

ROOT = HERE.parents[1]
WORK = ROOT / "build" / "mutants"
SOURCE = WORK / "source"
SANITIZERS = {"thread": "thread", "address": "address,undefined"}
Row = tuple[Mutant | None, str, str, float]


def copy_sources() -> None:
    """Copies what is compiled or imported; what is there already keeps its date, so that it is not built again."""
    files = [ROOT / "CMakeLists.txt"]
    for folder in ("csrc", "python", emulate.PACKAGE):
        files += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".so", ".pyc")]
    wanted = {SOURCE / path.relative_to(ROOT): path for path in files}
    for old in [p for p in SOURCE.rglob("*") if p.is_file() and p not in wanted]:
        old.unlink()
    for target, path in wanted.items():
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def build(family: str, check: str, folder: Path) -> str:
    """Builds what the check runs and puts a copy into `folder`; returns what went wrong."""
    if check == "bits":
        wrong = emulate.build(SOURCE, WORK / "bits")
        if not wrong:
            package = WORK / "bits" / emulate.PACKAGE
            shutil.copytree(package, folder / emulate.PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        return wrong
    program = f"test_cuda_{family}"
    options = ["-DCACOVID_CUDA=0", f"-DCACOVID_SANITIZE={SANITIZERS[check]}"]
    wrong = emulate.compile_cpp(SOURCE, WORK / check, program, *options)
    if not wrong:
        shutil.copy(WORK / check / "csrc" / "tests" / program, folder / "program")
    return wrong


def run(family: str, check: str, folder: Path) -> int:
    """0 where nothing was noticed, 1 where something was, 2 where the tests could not run."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    # Not `python -m pytest`, which would import the package of the checkout.
    pytest = [str(Path(sys.executable).with_name("pytest")), "-x", "-q", "--no-header"]
    tests = [*pytest, str(HERE / f"test_cuda_{family}.py")]
    command = tests if check == "bits" else [str(folder / "program")]
    try:
        status = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return 1
    return 2 if check == "bits" and status > 1 else int(status != 0)  # the machine stops the process at some mistakes


def main() -> int:
    options, paths = parse_arguments((__doc__ or "").splitlines()[0], HERE / "mutants")
    mutants = [m for path in paths for m in listed(path, "caught_by", "bits", options.each)]
    work: list[tuple[Mutant | None, str, str]] = [
        (None, family, check) for family, check in sorted({(m.family, m.check) for m in mutants})
    ]
    work += [(m, m.family, m.check) for m in mutants]
    copy_sources()

    def examine(mutant: Mutant | None, family: str, check: str, problem: str, folder: str) -> Row:
        try:
            label = f"test_cuda_{family}, {check}"
            return mutant, label, *verdict(mutant, problem, lambda: run(family, check, Path(folder)))
        finally:
            shutil.rmtree(folder)

    rows: list[Future[Row]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, family, check in work:
            folder = tempfile.mkdtemp(prefix="mutant-")
            problem = mutant.plant(SOURCE) if mutant else ""
            if not problem and (output := build(family, check, Path(folder))):
                problem = f"DOES NOT COMPILE: {output[-2000:]}"
            rows.append(pool.submit(examine, mutant, family, check, problem, folder))
            if mutant:
                shutil.copyfile(ROOT / mutant.file, SOURCE / mutant.file)
        return report(row.result() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
