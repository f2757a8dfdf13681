"""Online combination space sampling in one launch: the first programs draw tokens, each for some samples of a frame,
the last ones frames, each for some samples of a video.

Videos of different plans take a launch per run of equal ones. Frames of more than `MOST_TOKENS` tokens, and frame
combinations of videos of more than `MOST_FRAMES` frames, are served by the reference.
"""

from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacovid_kernels.reference import combinations as reference
from cacovid_kernels.triton.combination_space import (
    KEY_NEG_INF,
    frame_weights,
    group_space,
    group_start,
    ranked_words,
    running_shares,
    status_bits,
    token_weights,
)
from cacovid_kernels.triton.exact import double_of, order_key, word_index, word_key
from cacovid_kernels.triton.launch import block, double_bits, launch
from cacovid_kernels.triton.noise import gumbel_noise, ln_float, random_bits, step_of

MOST_TOKENS, MOST_FRAMES = 2048, 2048  # more of them need more registers than a thread has; 2^12 fit a race word
PROGRAMS = 1024  # enough for every GPU: more of them would only repeat the ranking
STREAM_FRAMES, STREAM_GROUPS, STREAM_TOKENS = tl.constexpr(253), tl.constexpr(254), tl.constexpr(255)
NOBODY = tl.constexpr(1 << 12)  # behind every position
NO_WORD = tl.constexpr(-(1 << 63))  # the last of rank words, without a chance


# ---- races --------------------------------------------------------------------------------------


@triton.jit
def _race_word(key, item, slot):
    """int64 >= 0 of an order key and two numbers below 2^12: the larger one wins, of equal keys the lower item."""
    return (key << 24) | (0xFFFFFF - ((item << 12) | slot)).to(tl.int64)


@triton.jit
def _perturbed(weight, names, seed, step, stream):
    """Order keys, int64, of ln(weight) + noise, for positive weights; `names` are column, row and sample."""
    bits = random_bits(names[0], names[1], names[2], seed, step, stream)
    return order_key(ln_float(weight) + gumbel_noise(bits)).to(tl.int64)


@triton.jit
def _finish_race(word, k):
    """Races `[S, W]`, word -1 where nobody starts, in the order of arrival: item and slot of each, and whether it is
    among the first `k`."""
    word = tl.sort(word, descending=True)
    low = 0xFFFFFF - (word & 0xFFFFFF).to(tl.int32)
    won = (word >= 0) & (tl.arange(0, word.shape[1])[None, :] < k)
    return low >> 12, low & 0xFFF, word >= 0, won


@triton.jit
def _order_log_prob(weight, won):
    """ln of the probability, float64 `[S]`, of the order in which weights `[S, W]` arrived, as far as they won."""
    weight = weight.to(tl.float64)
    racing = tl.cumsum(weight, 1, reverse=True)  # from the last place to the first: nothing is ever subtracted
    chance = tl.where(won, weight, 1.0) / tl.where(won, racing, 1.0)
    return tl.sum(ln_float(chance.to(tl.float32)).to(tl.float64), 1)


@triton.jit
def _store_winners(out, item, won, base, sample, last, stride, k):
    """Row `sample` of `out` gets the items that won, ascending and counted from `base`, and -1 up to k entries."""
    item = tl.sort(tl.where(won, item, NOBODY))
    place = tl.arange(0, item.shape[1])[None, :]
    position = tl.where(item < NOBODY, base + item.to(tl.int64), -1)
    tl.store(out + sample.to(tl.int64)[:, None] * stride + place, position, mask=(sample < last)[:, None] & (place < k))


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def _draw_tokens(scores, step_of_scores, memory, indices, groups, log_prob, status, row_stride, frame_stride,
                 video, frame, base, tokens, num_draw, size, remainder, num_groups, cap, begin, last, seed, step,
                 P: tl.constexpr, G: tl.constexpr, W: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Samples [begin, last) of one frame; the pointers are to its scores and to its columns of the outputs."""
    word = ranked_words(scores, step_of_scores, tokens, P)  # [P]
    best = tl.max(word_key(word), 0)
    if begin == 0:
        tl.store(status, status_bits(word_key(word), tokens, num_draw))
    probability, scale = group_space(word, memory, tokens, num_draw, size, remainder, num_groups, cap, G)  # [G]
    running = running_shares(probability)
    total = tl.max(running, 0)
    tl.store(memory + tl.arange(0, P), word)  # members of a group are read back by rank
    tl.debug_barrier()
    slot = tl.arange(0, W)[None, :]
    for first in range(begin, last, S):
        sample = first + tl.arange(0, S)
        top = sample == 0  # the first of all samples holds the best tokens
        bits = random_bits(sample * 0 + frame, sample * 0 + video, sample, seed, step, STREAM_GROUPS)
        threshold = (bits.to(tl.int64) * total) >> 32
        group = tl.sum((running[None, :] <= threshold[:, None]).to(tl.int32), 1)  # [S]
        at = sample.to(tl.int64) * frame_stride
        tl.store(groups + at, tl.where(top, -1, group).to(tl.int64), mask=sample < last)
        drawn = tl.arange(0, G)[None, :] == group[:, None]
        chosen = tl.sum(tl.where(drawn, probability.to(tl.float32)[None, :], 0.0), 1)
        scale_inside = tl.sum(tl.where(drawn, scale[None, :], 0.0), 1)[:, None]
        start = tl.where(top, 0, group_start(group.to(tl.int64), size, remainder))
        members = memory + start[:, None]
        length = size + ((group < remainder) & (sample > 0)).to(tl.int32)
        member = tl.load(members + slot, mask=slot < length[:, None], other=NO_WORD)  # [S, W]
        token, key = word_index(member).to(tl.int32), word_key(member)
        weight = token_weights(key, best, scale_inside, size)
        names = (frame * tokens + token, token * 0 + video, token * 0 + sample[:, None])
        arrival = tl.where(top[:, None], P - slot, _perturbed(weight, names, seed, step, STREAM_TOKENS))
        race = tl.where(key > KEY_NEG_INF, _race_word(arrival, token, slot), -1)
        token, place, raced, won = _finish_race(race, num_draw)
        _store_winners(indices, token, won, base, sample, last, row_stride, num_draw)
        key = word_key(tl.load(members + place, mask=raced, other=0))
        weight = tl.where(raced, token_weights(key, best, scale_inside, size), 0.0)
        inside = ln_float(chosen).to(tl.float64) + _order_log_prob(weight, won)
        tl.store(log_prob + at, tl.where(top, 0.0, inside).to(tl.float32), mask=sample < last)


@triton.jit
def _entry_weight(entry):
    """The weight in the high half of an int64, float32."""
    return (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _draw_frames(scores, step_of_scores, memory, indices, log_prob, status, row_stride, video_stride,
                 video, base, frames, num_frames, num_samples, begin, last, seed, step,
                 T: tl.constexpr, S: tl.constexpr, STRICT: tl.constexpr):  # fmt: skip
    """Samples [begin, last) of the frames of one video; the pointers are as above."""
    word = ranked_words(scores, step_of_scores, frames, T)  # [T]
    if begin == 0:
        tl.store(status, status_bits(word_key(word), frames, num_frames))
    bits = frame_weights(word_key(word), frames, num_samples, STRICT).to(tl.uint32, bitcast=True)
    tl.store(memory + tl.arange(0, T), (bits.to(tl.int64) << 32) | word_index(word))  # by rank
    tl.debug_barrier()
    for first in range(begin, last, S):
        sample = first + tl.arange(0, S)
        top = sample == 0
        slot = tl.arange(0, T)[None, :] + sample[:, None] * 0  # [S, T]
        entry = tl.load(memory + slot)
        frame, weight = (entry & 0xFFFFFFFF).to(tl.int32), _entry_weight(entry)
        names = (frame, frame * 0 + video, frame * 0 + sample[:, None])
        noisy = _perturbed(tl.where(weight > 0, weight, 1.0), names, seed, step, STREAM_FRAMES)
        race = tl.where(weight > 0, _race_word(tl.where(top[:, None], T - slot, noisy), frame, slot), -1)
        frame, place, raced, won = _finish_race(race, num_frames)
        _store_winners(indices, frame, won, base, sample, last, row_stride, num_frames)
        inside = _order_log_prob(_entry_weight(tl.load(memory + place, mask=raced, other=0)), won)
        at = sample.to(tl.int64) * video_stride
        tl.store(log_prob + at, tl.where(top, 0.0, inside).to(tl.float32), mask=sample < last)


_INTEGERS = [
    "seed", "step", "first_video", "first_frame", "first_token", "first_column", "first_frame_column", "row_step",
    "frames", "tokens", "num_draw", "size", "remainder", "num_groups", "cap", "num_samples", "chunk", "chunks",
    "token_programs", "columns", "frame_columns", "all_frames", "num_frames", "num_frame_samples", "frame_chunk",
    "frame_chunks", "videos",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def combinations_kernel(
    scores, frame_scores, added_steps, memory,
    indices, groups, log_prob, frame_indices, frame_log_prob, frame_status, frame_draw_status,
    row_step: tl.int64, score_step: tl.int64, frame_score_step: tl.int64, seed: tl.int64, step: tl.int64,
    first_video: tl.int64, first_frame: tl.int64, first_token: tl.int64, first_column: tl.int64,
    first_frame_column: tl.int64, frames: tl.int64, tokens: tl.int32, num_draw: tl.int32, size: tl.int32,
    remainder: tl.int32, num_groups: tl.int32, cap: tl.int64, num_samples: tl.int32, chunk: tl.int32,
    chunks: tl.int32, token_programs: tl.int32, columns: tl.int64, all_frames: tl.int64, num_frames: tl.int32,
    num_frame_samples: tl.int32, frame_chunk: tl.int32, frame_chunks: tl.int32, frame_columns: tl.int64,
    videos: tl.int64,
    P: tl.constexpr, G: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SF: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """The videos of one run: `first_*` count what lies before them, `columns`, `frame_columns`, `all_frames` and
    `videos` the columns of the outputs."""
    program = tl.program_id(0)
    step = step_of(step, added_steps)
    if program < token_programs:
        n, begin = (program // chunks).to(tl.int64), program % chunks * chunk  # n: number of the frame in the run
        row = first_frame + n
        _draw_tokens(
            scores + n * row_step, score_step, memory + program.to(tl.int64) * P,
            indices + first_column + n * num_draw, groups + row, log_prob + row, frame_status + row, columns,
            all_frames, first_video + n // frames, n % frames, first_token + n * tokens, tokens, num_draw, size,
            remainder, num_groups, double_of(cap), begin, tl.minimum(begin + chunk, num_samples), seed, step,
            P, G, W, S,
        )  # fmt: skip
    elif T > 0:
        program -= token_programs
        n, begin = (program // frame_chunks).to(tl.int64), program % frame_chunks * frame_chunk
        base, video = first_frame + n * frames, first_video + n
        _draw_frames(
            frame_scores + base * frame_score_step, frame_score_step,
            memory + token_programs.to(tl.int64) * P + program.to(tl.int64) * T,
            frame_indices + first_frame_column + n * num_frames, frame_log_prob + video, frame_draw_status + video,
            frame_columns, videos, video, base, frames.to(tl.int32), num_frames, num_frame_samples, begin,
            tl.minimum(begin + frame_chunk, num_frame_samples), seed, step, T, SF, STRICT,
        )  # fmt: skip


# ---- launches -----------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What the host knows about a video."""

    frames: int
    tokens: int  # of a frame
    num_draw: int
    num_groups: int
    group_cap: float
    num_frames: int


def _samples_per_block(num_samples: int, warps: int, lanes: int) -> int:
    """As many as leave four lanes to a thread, in blocks of `lanes` per sample."""
    return max(min(block(num_samples, 1), warps * 128 // max(lanes, 1)), 1)


def _samples_per_program(num_samples: int, per_block: int, rows: int) -> int:
    """A multiple of what a block holds: fewer programs for many rows, whose ranking every program repeats."""
    return per_block * max(triton.cdiv(triton.cdiv(num_samples, per_block), max(PROGRAMS // rows, 1)), 1)


def sample_combinations(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: list[int],
    num_samples: int,
    num_draw: list[int],
    num_groups: list[int],
    max_group_prob: float,
    num_frame_samples: int,
    num_frames: list[int],
    strict: bool,
    seed: int,
    step: int,
    added_steps: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, h, w = grid_thw[::3], grid_thw[1::3], grid_thw[2::3]
    tokens = [a * b for a, b in zip(h, w, strict=True)]
    if max(tokens, default=0) > MOST_TOKENS or (num_frame_samples > 0 and max(t, default=0) > MOST_FRAMES):
        return reference.sample_combinations(
            token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, max_group_prob,
            num_frame_samples, num_frames, strict, seed, step, added_steps,
        )  # fmt: skip
    caps = [reference.group_cap(groups, max_group_prob) for groups in num_groups]
    plans = [_Plan(*plan) for plan in zip(t, tokens, num_draw, num_groups, caps, num_frames, strict=True)]
    device, videos, frames = token_scores.device, len(plans), sum(t)
    columns, frame_columns = sum(p.frames * p.num_draw for p in plans), sum(num_frames)
    outputs = (
        torch.empty(num_samples, columns, dtype=torch.int64, device=device),
        torch.empty(num_samples, frames, dtype=torch.int64, device=device),
        torch.empty(num_samples, frames, dtype=torch.float32, device=device),
        torch.empty(num_frame_samples, frame_columns, dtype=torch.int64, device=device),
        torch.empty(num_frame_samples, videos, dtype=torch.float32, device=device),
        torch.empty(frames, dtype=torch.int32, device=device),
        torch.empty(videos if num_frame_samples else 0, dtype=torch.int32, device=device),
    )
    per_frame = None if frame_scores is None else frame_scores.reshape(-1)
    video = frame = token = column = frame_column = 0
    for p, run in groupby(plans):
        count = sum(1 for _ in run)
        rows = count * p.frames
        if token_scores.dim() == 1:
            scores = token_scores[token : token + rows * p.tokens].reshape(rows, p.tokens)
        else:
            scores = token_scores.reshape(-1, p.tokens)[frame : frame + rows]
        blocks = {"P": block(p.tokens), "G": block(p.num_groups), "W": block(-(-p.tokens // p.num_groups), 8)}
        blocks["T"] = block(p.frames) if num_frame_samples else 0
        warps = min(max(blocks["P"], blocks["T"], 256) // 128, 8)
        blocks["S"] = _samples_per_block(num_samples, warps, max(blocks["G"], blocks["W"]))
        blocks["SF"] = _samples_per_block(num_frame_samples, warps, blocks["T"])
        chunk = _samples_per_program(num_samples, blocks["S"], rows)
        frame_chunk = _samples_per_program(num_frame_samples, blocks["SF"], count)
        chunks, frame_chunks = triton.cdiv(num_samples, chunk), triton.cdiv(num_frame_samples, frame_chunk)
        token_programs, frame_programs = rows * chunks, count * frame_chunks
        size = token_programs * blocks["P"] + frame_programs * blocks["T"]
        memory = torch.empty(size, dtype=torch.int64, device=device)
        launch(
            combinations_kernel, (token_programs + frame_programs,), scores, per_frame, added_steps, memory, *outputs,
            scores.stride(0), scores.stride(1), 0 if per_frame is None else per_frame.stride(0), seed, step,
            video, frame, token, column, frame_column, p.frames, p.tokens, p.num_draw, p.tokens // p.num_groups,
            p.tokens % p.num_groups, p.num_groups, double_bits(p.group_cap), num_samples, chunk, chunks, token_programs,
            columns, frames, p.num_frames, num_frame_samples, frame_chunk, max(frame_chunks, 1), frame_columns, videos,
            num_warps=warps, maxnreg=255, STRICT=strict, **blocks,  # left alone, ptxas spills for occupancy
        )  # fmt: skip
        video, frame, token = video + count, frame + rows, token + rows * p.tokens
        column, frame_column = column + rows * p.num_draw, frame_column + count * p.num_frames
    return outputs
