"""The checks of compiled CUDA kernels see what they look for, in text as ptxas and cuobjdump print it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "cuda" / "compile.py"
spec = importlib.util.spec_from_file_location("cuda_compile", PATH)
cuda_compile = sys.modules["cuda_compile"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_compile)

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6narrowIfEvPKT_PS0_i' for 'sm_80'
ptxas info    : Function properties for _Z6narrowIfEvPKT_PS0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 2 barriers, 2048 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 15.011 ms
ptxas info    : Compiling entry function '_Z6narrowIfEvPKT_PS0_i' for 'sm_90a'
ptxas info    : Function properties for _Z6narrowIfEvPKT_PS0_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z6spillsPK6float4PS_i' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsPK6float4PS_i
    968 bytes stack frame, 956 bytes spill stores, 940 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 968 bytes cumulative stack size
"""
SASS = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]
host = linux
\t.target\tsm_80

\t\tFunction : _Z6narrowIfEvPKT_PS0_i
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;    /* 0x00000a00ff017624 */
                                                                               /* 0x000fe200078e00ff */
        /*0010*/              @!P0 LDG.E.NA.128.CONSTANT R4, [R2.64] ;         /* 0x0000000402007981 */
        /*0020*/               @P1 STG.E.64 [R4.64], R2 ;                      /* 0x0000000204007986 */
Fatbin ptx code:
================
arch = sm_90
Fatbin elf code:
================
arch = sm_90a
\t\tFunction : _Z6narrowIfEvPKT_PS0_i
        /*0000*/                   LDG.E.128 R16, desc[UR4][R28.64+0x1c000] ;  /* 0x01c000041c107981 */
        /*0010*/              @UP0 STG.E.EF.128 desc[UR4][R28.64], R16 ;       /* 0x01c000041c107986 */
\t\tFunction : _Z6spillsPK6float4PS_i
        /*0000*/                   STL.64 [R1+0x168], R16 ;                    /* 0x0001681001007387 */
        /*0010*/                   LDL.LU.64 R16, [R1+0x168] ;                 /* 0x0001681001107983 */
        /*0020*/              @!P0 BPT.TRAP 0x1 ;                              /* 0x000000040000895c */
"""
NARROW, SPILLS = "_Z6narrowIfEvPKT_PS0_i", "_Z6spillsPK6float4PS_i"


@pytest.fixture
def kernels():
    found = cuda_compile.read_ptxas(PTXAS)
    cuda_compile.read_sass(SASS, found)
    return found


def test_resources_are_read(kernels):
    assert kernels.keys() == {(NARROW, 80), (NARROW, 90), (SPILLS, 90)}
    first, second, third = kernels.values()
    assert (first.registers, first.barriers, first.shared, first.stack, first.spilled) == (18, 2, 2048, 0, 0)
    assert (second.registers, second.barriers, second.shared) == (20, 0, 0)
    assert (third.registers, third.stack, third.spilled) == (32, 968, 956 + 940)
    assert dict(first.opcodes) == {"IMAD.MOV.U32": 1, "LDG.E.NA.128.CONSTANT": 1, "STG.E.64": 1}


def test_what_no_kernel_may_do_is_seen(kernels):
    faults = {key: kernel.faults() for key, kernel in kernels.items()}
    assert faults[NARROW, 80] == faults[NARROW, 90] == []
    assert faults[SPILLS, 90] == [
        "968 bytes of stack", "1896 bytes spilled", "2 accesses to local memory", "1 traps",
    ]  # fmt: skip
    assert cuda_compile.Kernel("absent", 90).faults() == ["no machine code"]


def test_wide_accesses_are_seen(kernels, monkeypatch):
    assert not kernels[NARROW, 80].moves_16_bytes()  # it only loads them
    assert kernels[NARROW, 90].moves_16_bytes()
    monkeypatch.setattr(cuda_compile, "WIDE", {"a.cu": "narrow", "b.cu": "absent", "not built.cu": "absent"})
    del kernels[SPILLS, 90]
    assert cuda_compile.judge(kernels, ["a.cu", "b.cu"]) == [
        "a.cu on sm_80: no kernel narrow* loads and stores 16 bytes at a time",
        "b.cu on sm_80: no kernel absent* loads and stores 16 bytes at a time",
        "b.cu on sm_90: no kernel absent* loads and stores 16 bytes at a time",
    ]


def test_contraction_is_seen():
    commands = [
        {"file": "a.cpp", "command": "g++ a.cpp"},
        {"file": "b.cu", "command": "nvcc -O3 -fmad=false b.cu"},
        {"file": "c.cu", "command": "nvcc -O3 c.cu"},
        {"file": "d.cu", "command": "nvcc -fmad=false --use_fast_math d.cu"},
    ]
    assert [line.split(":")[0] for line in cuda_compile.contracted(commands)] == ["c.cu", "d.cu"]


def test_files_that_claim_wide_accesses_exist():
    for file in cuda_compile.WIDE:
        assert (PATH.parents[2] / "csrc" / "cuda" / file).exists()


@pytest.mark.skipif(not shutil.which("c++filt"), reason="c++filt is missing")
def test_names_are_short(kernels):
    for (symbol, _), kernel in kernels.items():
        kernel.name = cuda_compile.short(symbol)
    assert [kernel.name for kernel in kernels.values()] == ["narrow<float>", "narrow<float>", "spills"]
    symbol = "_ZN7cacovid4cuda41_GLOBAL__N__5d78ea12_9_gather_cu_4829fcd613gather_kernelENS1_7TensorsE"
    assert cuda_compile.short(symbol) == "gather_kernel"
    lines = cuda_compile.table(kernels).splitlines()
    assert lines[1].split() == ["narrow<float>", "18", "20", "2048", "2", "-"]
    assert lines[2].split() == ["spills", "-", "32", "0", "1", "-"]
