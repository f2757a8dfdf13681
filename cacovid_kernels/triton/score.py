"""The folded head in four launches: three layers as tiled products, then the last two as one."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.triton import INTERPRETED
from cacovid_kernels.triton.frame_pool import frame_pool as frame_pool
from cacovid_kernels.triton.launch import launch


class Tile(NamedTuple):
    """What one program of a layer computes, [rows, units], and how."""

    rows: int
    units: int
    inputs: int  # of one step along the sum
    num_warps: int
    num_stages: int
    efficiency: float = 1.0  # share of a multiprocessor's rate that such a program keeps up: an estimate


# A step reads [rows + units, inputs] from the L2 cache, whose bandwidth bounds what smaller tiles reach. The smallest
# of the 16-bit ones is for few rows, as those of the frames: enough programs to stream the weights in.
WIDE = Tile(128, 256, 64, 8, 3)  # spills registers unless tensor cores take both factors from shared memory
TILES = [Tile(128, 128, 64, 8, 3, 0.85), Tile(64, 64, 64, 4, 4, 0.6), Tile(32, 16, 256, 4, 3, 0.12)]
FLOAT32_TILES = [Tile(128, 64, 32, 8, 3), Tile(32, 32, 64, 4, 3, 0.5)]
LAST = Tile(32, 256, 64, 8, 3)
PLAIN = Tile(32, 32, 32, 4, 2)  # for widths that no 16-byte load fits, and for the last layers in float32
WIDTH = 16  # what a width or stride has to divide by for Triton to use 16-byte loads


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def multiply(
    rows, weight, i_row, i_unit, m_unit, stride_row, stride_unit, inputs, INPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [rows, units]: rows [., inputs] times weight [units, inputs] transposed."""
    i_input = tl.arange(0, INPUTS)
    row_pointers = rows + i_row[:, None] * stride_row + i_input[None, :]
    weight_pointers = weight + i_unit[None, :] * stride_unit + i_input[:, None]
    total = tl.zeros([i_row.shape[0], i_unit.shape[0]], tl.float32)
    for o_input in range(0, inputs, INPUTS):
        if EVEN:
            b_row, b_weight = tl.load(row_pointers), tl.load(weight_pointers, m_unit, other=0.0)
        else:
            m_input = o_input + i_input < inputs
            b_row = tl.load(row_pointers, m_input[None, :], other=0.0)
            b_weight = tl.load(weight_pointers, m_input[:, None] & m_unit, other=0.0)
        total = tl.dot(b_row, b_weight, total, input_precision="ieee")
        row_pointers += INPUTS
        weight_pointers += INPUTS
    return total


@triton.jit(do_not_specialize=["count"])
def layer_kernel(
    rows, rrms, weight, bias, out, stride_row, stride_unit, count: tl.int64, inputs, units,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Neighbours share rows, and all programs the weight: 13 MB in the widest layer, which the L2 cache holds.
    tiles = tl.cdiv(units, UNITS)
    i_row = tl.program_id(0).to(tl.int64) // tiles * ROWS + tl.arange(0, ROWS)
    i_unit = tl.program_id(0).to(tl.int64) % tiles * UNITS + tl.arange(0, UNITS)
    at_row, m_unit = tl.minimum(i_row, count - 1), (i_unit < units)[None, :]  # rows past the end need no mask
    total = multiply(rows, weight, at_row, i_unit, m_unit, stride_row, stride_unit, inputs, INPUTS, EVEN)
    if rrms is not None:
        total *= tl.load(rrms + at_row)[:, None]
    total += tl.load(bias + i_unit[None, :], m_unit, other=0.0).to(tl.float32)
    pointers = out + i_row[:, None] * units + i_unit[None, :]
    tl.store(pointers, silu(total).to(out.dtype.element_ty), (i_row < count)[:, None] & m_unit)


@triton.jit(do_not_specialize=["count"])
def last_kernel(
    rows, weight, bias, vector, offset, scores, stride_unit, count: tl.int64, inputs, units,
    ROWS: tl.constexpr, UNITS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_row = tl.minimum(i_row, count - 1)
    score = tl.zeros([ROWS], tl.float32)
    for o_unit in range(0, units, UNITS):
        i_unit = o_unit + tl.arange(0, UNITS).to(tl.int64)
        m_unit = (i_unit < units)[None, :]
        total = multiply(rows, weight, at_row, i_unit, m_unit, inputs, stride_unit, inputs, INPUTS, EVEN)
        total += tl.load(bias + i_unit[None, :], m_unit, other=0.0).to(tl.float32)
        score += tl.sum(silu(total) * tl.load(vector + i_unit[None, :], m_unit, other=0.0), 1)
    tl.store(scores + i_row, score + tl.load(offset), i_row < count)


def _gpu(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten, and multiprocessors: of an H100 where nothing runs on a GPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return 10 * properties.major + properties.minor, properties.multi_processor_count
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch, 132


@lru_cache(1024)
def _tile(rows: int, units: int, inputs: int, halves: bool, arch: int, multiprocessors: int) -> Tile:
    """The tile whose programs, in as many rounds as they need, should end first."""

    def cost(tile: Tile) -> float:
        rounds = triton.cdiv(triton.cdiv(rows, tile.rows) * triton.cdiv(units, tile.units), multiprocessors)
        return rounds * tile.rows * tile.units / tile.efficiency

    if inputs % WIDTH:
        return PLAIN
    wide = [WIDE] if arch in range(90, 120) else []  # wgmma, tcgen05
    return min(wide + TILES if halves else FLOAT32_TILES, key=cost)


def _options(tile: Tile, inputs: int) -> dict[str, int]:
    return {
        "ROWS": tile.rows, "UNITS": tile.units, "INPUTS": tile.inputs, "EVEN": inputs % tile.inputs == 0,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def _packed(x: Tensor) -> Tensor:
    """`x`, copied if its rows are not contiguous or 16-byte loads could read them only in a copy."""
    aligned = x.stride(0) % WIDTH == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(1) == 1 and (aligned or x.shape[1] % WIDTH) else x.clone(memory_format=torch.contiguous_format)


def head_scores(
    rows: Tensor, rrms: Tensor | None, weights: list[Tensor], biases: list[Tensor], vector: Tensor, offset: Tensor
) -> Tensor:
    count, halves = rows.shape[0], rows.element_size() == 2
    gpu = _gpu(rows.device)
    rows, rrms = _packed(rows), None if rrms is None else rrms.contiguous()
    for weight, bias in zip(map(_packed, weights[:-1]), biases[:-1], strict=True):
        units, inputs = weight.shape
        tile = _tile(count, units, inputs, halves, *gpu)
        grid = (triton.cdiv(count, tile.rows) * triton.cdiv(units, tile.units),)
        out = rows.new_empty(count, units)
        launch(
            layer_kernel, grid, rows, rrms, weight, bias.contiguous(), out, rows.stride(0), weight.stride(0), count,
            inputs, units, **_options(tile, inputs),
        )  # fmt: skip
        rows, rrms = out, None
    weight = _packed(weights[-1])
    units, inputs = weight.shape
    tile = LAST if halves and inputs % WIDTH == 0 else PLAIN
    scores = torch.empty(count, dtype=torch.float32, device=rows.device)
    launch(
        last_kernel, (triton.cdiv(count, tile.rows),), rows, weight, biases[-1].contiguous(), vector.contiguous(),
        offset, scores, weight.stride(0), count, inputs, units, **_options(tile, inputs),
    )  # fmt: skip
    return scores
