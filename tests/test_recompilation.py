"""torch.compile keeps every op whole and compiles once for videos of any size (their number is part of the graph)."""

from __future__ import annotations

import pytest
import torch

import cacovid_kernels as ck

SHAPES = [(4, 16), (6, 20), (8, 25), (3, 30), (10, 36), (12, 49), (5, 64), (7, 81)]


def select(token, frame, rows, i):
    kept = ck.select_tokens(token, frame, keep_ratio=0.25, order="score")
    return kept.indices, kept.frame_counts, kept.status, kept.cu_seqlens


def select_strictly(token, frame, rows, i):
    return ck.select_tokens(token, frame, keep_ratio=0.3, max_frame_ratio=0.5, mode="strict").indices


def select_a_number(token, frame, rows, i):
    return ck.select_tokens(token, frame, num_tokens=token.numel() // 3).indices


def budget(token, frame, rows, i):
    t, p = token.shape
    return ck.allocate_budget(frame, [(t, 1, p)], num_tokens=t * p // 2)


def best_of_segments(token, frame, rows, i):
    return ck.segmented_topk(token.flatten(), [2, token.numel() // 3], [0, token.numel() // 2, token.numel()])


def gumbel(token, frame, rows, i):
    draw = ck.gumbel_topk(token, token.shape[1] // 4, num_samples=2, seed=1, step=i)
    return draw.indices, draw.log_prob, ck.pl_log_prob(token, draw.indices)


def combinations(token, frame, rows, i):
    drawn = ck.sample_combinations(
        token, frame, num_samples=3, keep_ratio=0.1, num_frame_samples=2, seed=1, step=i
    )  # fmt: skip
    return drawn.indices, drawn.log_prob, drawn.frame_indices, drawn.status


def gather(token, frame, rows, i):
    kept = ck.select_tokens(token, frame, keep_ratio=0.25)
    return ck.gather_tokens({"rows": rows, "positions": torch.arange(token.numel())}, kept)["rows"]


def repack(token, frame, rows, i):
    kept = ck.select_tokens(token, frame, keep_ratio=0.25)
    cache = [rows.view(1, 1, *rows.shape)], [rows.view(1, 1, *rows.shape) * 2]
    return ck.repack_kv(cache, kept)[1][0]


def paged(token, frame, rows, i):
    t, p = token.shape
    kept = ck.select_tokens(token, frame, keep_ratio=0.25)
    pages = torch.cat([rows.view(t, p, 1, 8), rows.view(t, p, 1, 8)])  # a frame is a block
    table = torch.arange(t).flip(0)[None]
    found = ck.repack_paged_kv((pages, pages * 2), table, torch.full((1,), t * p), kept)
    return found.keys[0], found.block_table, found.freed_blocks


def policy_loss(token, frame, rows, i):
    n = token.numel()
    drawn = ck.sample_combinations(token, num_samples=3, keep_ratio=0.1, seed=1, step=i)
    sums = ck.combination_sums(drawn.packed_mask(), torch.arange(3.0), num_tokens=n)
    masks = rows.t() > 0
    loss = ck.combination_policy_loss(token.flatten(), rows[:, 0], masks, torch.arange(8.0), kl_weight=0.1)
    return sums.loss(token.flatten(), rows[:, 0]), loss


def attention(token, frame, rows, i):
    query, keys = rows[:3].view(1, 1, 3, -1).expand(1, 2, 3, -1), rows.view(1, 1, *rows.shape)
    return ck.attention_scores(query, keys, row_positions=torch.arange(3) + rows.shape[0] - 3)


CALLS = [
    select, select_strictly, select_a_number, budget, best_of_segments, gumbel, combinations, gather, repack, paged,
    policy_loss, attention,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_eight_shapes_are_compiled_once(call):
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for i, (t, p) in enumerate(SHAPES, start=2):
        args = torch.randn(t, p), torch.randn(t), torch.randn(t * p, 8), i
        expected, found = call(*args), compiled(*args)
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(compilations) == 1
