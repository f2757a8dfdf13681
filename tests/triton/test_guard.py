"""The guard catches the bugs that the interpreter hides, and passes a kernel without any."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from cacovid_kernels.triton.launch import launch


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def increment(out):
    tl.store(out, tl.load(out) + 1)


@triton.jit
def add(out):
    tl.atomic_add(out, 1)


@triton.jit
def add_then_read(counter, out):
    tl.atomic_add(counter, 1)
    tl.store(out + tl.program_id(0), tl.load(counter))


@triton.jit
def shift(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) + tl.program_id(0) * BLOCK
    tl.store(x + i, tl.load(x + i + 1, mask=i + 1 < n), mask=i + 1 < n)


@triton.jit
def write_twice(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i)


@triton.jit
def row_offset(out, row, width):
    tl.store(out, (row * width).to(tl.int64))


def numbers(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def test_a_clean_kernel_passes():
    x, out = numbers(100), torch.empty(100, dtype=torch.int32)
    launch(copy, (7,), x, out, 100, BLOCK=16)
    assert torch.equal(x, out)


def test_atomics_of_several_programs_pass():
    out = torch.zeros(1, dtype=torch.int32)
    launch(add, (9,), out)
    assert out.item() == 9


def past_the_end():
    launch(copy, (7,), numbers(100), torch.empty(100, dtype=torch.int32), 101, BLOCK=16)


def past_the_end_of_a_view():
    launch(copy, (7,), numbers(200)[:100], torch.empty(200, dtype=torch.int32), 104, BLOCK=16)


def ignored_stride():
    launch(copy, (7,), numbers(200)[::2], torch.empty(100, dtype=torch.int32), 100, BLOCK=16)


def wrong_width():
    x = numbers(100)
    launch(copy, (7,), x, torch.empty(100, dtype=torch.int64).view(torch.int32)[::2], 100, BLOCK=16)


def lost_update():
    launch(increment, (2,), torch.zeros(1, dtype=torch.int32))


def read_of_a_counter():
    launch(add_then_read, (2,), torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32))


def overlapping_moves():
    launch(shift, (7,), numbers(100), 100, BLOCK=16)


def element_written_twice():
    launch(write_twice, (1,), torch.empty(16, dtype=torch.int32), BLOCK=16)


BUGS = [
    past_the_end,
    past_the_end_of_a_view,
    ignored_stride,
    wrong_width,
    lost_update,
    read_of_a_counter,
    overlapping_moves,
    element_written_twice,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug):
    with pytest.raises(InterpreterError, match=r"race|outside every argument"):
        bug()


def test_an_overflowing_offset_is_caught():
    with pytest.raises(InterpreterError, match="overflow"):
        launch(row_offset, (1,), torch.empty(1, dtype=torch.int64), 70000, 40000)
