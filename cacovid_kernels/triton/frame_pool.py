"""Row norms and frame means of hidden states in one streaming read."""

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton.launch import block, launch

# A program reads whole rows of one frame, so that their norms are complete, and adds up at most 64 of them. For 32
# frames of 14 x 14 these are 128 programs on 132 multiprocessors, whose sums a second launch adds: 1.8 MB written and
# read next to 45 MB. One program per frame would leave no parts to add, but 32 multiprocessors draw at most
# 64 bytes per clock each, less than the memory yields; programs over columns would leave the norms in parts.
# How many rows depends on the frame alone: its mean has the same bits in every batch.
ROWS = 64
TILE_BYTES = 1 << 15  # two of them on their way to shared memory: enough for the memory's latency
ADDED_COLUMNS = 256


@triton.jit(do_not_specialize=["first_row", "frame_rows", "program_rows", "programs"])
def pool_kernel(
    hidden, rrms, sums, stride_row, stride_column, first_row: tl.int64, frame_rows: tl.int64,
    program_rows, programs, columns, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    i_frame, start = i_program // programs, (i_program % programs) * program_rows
    i_row = first_row + i_frame * frame_rows + start + tl.arange(0, ROWS)
    m_row = tl.arange(0, ROWS) < tl.minimum(frame_rows - start, program_rows)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for o_column in tl.range(0, columns, COLUMNS, num_stages=3):
        i_column = o_column + tl.arange(0, COLUMNS)
        m_column = i_column < columns
        pointers = hidden + i_row[:, None] * stride_row + i_column.to(tl.int64)[None, :] * stride_column
        b_hidden = tl.load(pointers, m_row[:, None] & m_column[None, :], other=0.0).to(tl.float32)
        squares = tl.fma(b_hidden, b_hidden, squares)
        share = tl.sum(b_hidden, 0) * tl.math.div_rn(1.0, frame_rows.to(tl.float32))
        tl.store(sums + i_program * columns + i_column, share, m_column)
    mean_square = tl.math.div_rn(tl.sum(squares, 1), tl.cast(columns, tl.float32))
    tl.store(rrms + i_row, tl.math.div_rn(1.0, tl.sqrt_rn(mean_square + eps)), m_row)


@triton.jit(do_not_specialize=["programs"])
def add_kernel(sums, means, programs, columns, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(columns, COLUMNS)
    i_frame = tl.program_id(0).to(tl.int64) // blocks
    i_column = (tl.program_id(0).to(tl.int64) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = i_column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for o_part in range(0, programs, 4):
        i_part = o_part + tl.arange(0, 4)
        pointers = sums + (i_frame * programs + i_part)[:, None] * columns + i_column[None, :]
        total += tl.sum(tl.load(pointers, (i_part < programs)[:, None] & m_column[None, :], other=0.0), 0)
    tl.store(means + i_frame * columns + i_column, total, m_column)


def frame_pool(hidden: Tensor, grid_thw: list[int], eps: float) -> tuple[Tensor, Tensor]:
    columns = hidden.shape[1]
    rrms = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    means = torch.empty(sum(grid_thw[::3]), columns, dtype=torch.float32, device=hidden.device)
    first_row = first_frame = 0
    videos = zip(grid_thw[::3], grid_thw[1::3], grid_thw[2::3], strict=True)
    for frame_rows, alike in groupby(videos, lambda video: video[1] * video[2]):  # one launch for videos of one size
        frames = sum(video[0] for video in alike)
        programs = triton.cdiv(frame_rows, ROWS)
        program_rows = triton.cdiv(frame_rows, programs)
        rows = block(program_rows)
        of_frames = means[first_frame : first_frame + frames]
        sums = of_frames if programs == 1 else means.new_empty(frames * programs, columns)
        launch(
            pool_kernel, (frames * programs,), hidden, rrms, sums, *hidden.stride(), first_row, frame_rows,
            program_rows, programs, columns, eps,
            num_warps=8, ROWS=rows, COLUMNS=TILE_BYTES // rows // hidden.element_size(),
        )  # fmt: skip
        if programs > 1:
            grid = (frames * triton.cdiv(columns, ADDED_COLUMNS),)
            launch(add_kernel, grid, sums, of_frames, programs, columns, num_warps=2, COLUMNS=ADDED_COLUMNS)
        first_row += frames * frame_rows
        first_frame += frames
    return rrms, means
