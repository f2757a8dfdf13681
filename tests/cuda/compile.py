"""Compiles every CUDA kernel for every architecture, from scratch, and checks what the compiler made of it; no GPU.

    python tests/cuda/compile.py [--limit 90]

Prints a table of resources. Exits with 1 if the build takes longer than the limit, a kernel uses the stack, spills
registers, touches local memory or traps, one that should move 16 bytes at a time does not, or a file was compiled
with contraction (a * b + c rounded once is another number than the CPU engine's).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "cuda"
JOBS = 2
# Files with a kernel that loads and stores 16 bytes at a time, by what that kernel is called.
WIDE = {"gather.cu": "gather", "repack.cu": "repack", "paged.cu": "paged", "select.cu": "select"}


@dataclass
class Kernel:
    """What ptxas and the SASS say of one kernel on one architecture."""

    name: str
    architecture: int
    registers: int = 0
    barriers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    opcodes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def faults(self) -> list[str]:
        """What no kernel may do."""
        local = sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in ("LDL", "STL"))
        traps = sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] == "BPT")
        found = {
            "bytes of stack": self.stack,
            "bytes spilled": self.spilled,
            "accesses to local memory": local,
            "traps": traps,
        }
        texts = [f"{n} {what}" for what, n in found.items() if n]
        return texts if self.opcodes else [*texts, "no machine code"]

    def moves_16_bytes(self) -> bool:
        return all(any(re.match(rf"{access}\.(\S+\.)?128\b", op) for op in self.opcodes) for access in ("LDG", "STG"))


def short(mangled: str) -> str:
    """`select_kernel<float>` of a symbol."""
    run = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    text = re.sub(r"^void |cacovid::|cuda::|\(anonymous namespace\)::", "", run.stdout.strip())
    return re.sub(r"\(.*$", "", text)


def read_ptxas(text: str) -> dict[tuple[str, int], Kernel]:
    """The kernels of `-Xptxas -v`, by symbol and architecture."""
    kernels: dict[tuple[str, int], Kernel] = {}
    current: Kernel | None = None
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'", line):
            current = kernels.setdefault((entry[1], int(entry[2])), Kernel(entry[1], int(entry[2])))
        if current is None:
            continue
        # Also of functions that the kernel calls; their lines follow its own.
        if frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack += int(frame[1])
            current.spilled += int(frame[2]) + int(frame[3])
        if use := re.search(r"Used (\d+) registers", line):
            current.registers = int(use[1])
            current.barriers = int((re.search(r"used (\d+) barriers", line) or [0, 0])[1])
            current.shared = int((re.search(r"(\d+) bytes smem", line) or [0, 0])[1])
    return kernels


def read_sass(text: str, kernels: dict[tuple[str, int], Kernel]) -> None:
    """Counts the instructions of every kernel in the output of `cuobjdump -sass`."""
    architecture, current = 0, None
    for line in text.splitlines():
        if target := re.match(r"\s*arch = sm_(\d+)", line):
            architecture, current = int(target[1]), None
        elif function := re.match(r"\s*Function : (\w+)", line):
            key = function[1], architecture
            current = kernels.setdefault(key, Kernel(*key))
        elif current and (code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)):
            current.opcodes[code[1]] += 1


def judge(kernels: dict[tuple[str, int], Kernel], files: list[str]) -> list[str]:
    """A line for everything that is wrong."""
    wrong = []
    for kernel in kernels.values():
        wrong += [f"{kernel.name} on sm_{kernel.architecture}: {fault}, {kernel.registers} registers"
                  for fault in kernel.faults()]  # fmt: skip
    for file, word in WIDE.items():
        for architecture in sorted({k.architecture for k in kernels.values()}) if file in files else []:
            mine = [k for k in kernels.values() if word in k.name and k.architecture == architecture]
            if not any(kernel.moves_16_bytes() for kernel in mine):
                wrong.append(f"{file} on sm_{architecture}: no kernel {word}* loads and stores 16 bytes at a time")
    return wrong


def contracted(commands: list[dict[str, str]]) -> list[str]:
    """CUDA files that were not compiled as the bits need."""
    cuda = [entry for entry in commands if entry["file"].endswith(".cu")]
    return [f"{entry['file']}: compiled without -fmad=false, or with fast arithmetic" for entry in cuda
            if "-fmad=false" not in entry["command"].split() or "fast_math" in entry["command"]]  # fmt: skip


def table(kernels: dict[tuple[str, int], Kernel]) -> str:
    """Registers on every architecture; static shared memory and barriers, which hardly differ, at their most."""
    architectures = sorted({kernel.architecture for kernel in kernels.values()})
    rows: dict[str, dict[int, Kernel]] = defaultdict(dict)
    for kernel in kernels.values():
        rows[kernel.name][kernel.architecture] = kernel
    width = max(map(len, rows), default=0) + 2
    lines = [f"{'registers':{width}}" + "".join(f"{f'sm_{a}':>8}" for a in architectures) + "  shared barriers 16-byte"]
    for name, row in sorted(rows.items()):
        registers = "".join(f"{row[a].registers if a in row else '-':>8}" for a in architectures)
        shared, barriers = max(k.shared for k in row.values()), max(k.barriers for k in row.values())
        wide = "yes" if all(k.moves_16_bytes() for k in row.values()) else "-"
        lines.append(f"{name:{width}}{registers}{shared:>8}{barriers:>9}{wide:>8}")
    return "\n".join(lines)


def find_cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or [])] if triton else []
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders), "/usr/local/cuda/bin"])
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        sys.exit(
            "cuobjdump is neither on the path nor part of an installed Triton. Install triton or the CUDA toolkit."
        )
    return found


def build() -> tuple[str, float, float]:
    """What nvcc said, seconds, and seconds that JOBS idle cores would have needed."""
    shutil.rmtree(WORK, ignore_errors=True)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    text = ""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(WORK), "-G", "Ninja", "-DCACOVID_CUDA=1", "-DCACOVID_TESTS=0",
         "-DCMAKE_CUDA_FLAGS=-Xptxas -v"],
        ["cmake", "--build", str(WORK), "--target", "cacovid_cuda", "-j", str(JOBS)],
    ):  # fmt: skip
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text += run.stdout
        if run.returncode:
            sys.exit(f"{text}\nThe CUDA kernels do not compile: see above.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return text, time.monotonic() - start, cpu / JOBS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=90, help="seconds that the build may take")
    limit = parser.parse_args().limit
    text, seconds, idle = build()
    kernels = read_ptxas(text)
    sass = subprocess.run([find_cuobjdump(), "-sass", str(WORK / "libcacovid_cuda.a")], capture_output=True, text=True)
    read_sass(sass.stdout, kernels)
    for (symbol, _), kernel in kernels.items():
        kernel.name = short(symbol)
    commands = json.loads((WORK / "compile_commands.json").read_text())
    wrong = judge(kernels, [Path(entry["file"]).name for entry in commands]) + contracted(commands)
    if not kernels:
        wrong.append(f"no kernel was compiled, or none could be read: {sass.stderr.strip()}")
    if min(seconds, idle) > limit:  # a loaded machine is no fault of the sources
        wrong.append(f"the build takes {idle:.0f} s of {JOBS} idle cores, the limit is {limit:g} s")
    print(table(kernels))
    print(f"built in {seconds:.0f} s, {idle:.0f} s of {JOBS} idle cores; limit {limit:g} s")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
