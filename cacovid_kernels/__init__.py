"""Fused kernels that choose, sample, gather and repack the video tokens of a Video-LLM."""

from __future__ import annotations

from cacovid_kernels._backend import backends, use_backend
from cacovid_kernels.combinations import Combinations
from cacovid_kernels.kv import PackedKV, PagedKV, RaggedKeep, Rope
from cacovid_kernels.ops.attention import attention_scores
from cacovid_kernels.ops.combinations import sample_combinations
from cacovid_kernels.ops.gather import gather_tokens
from cacovid_kernels.ops.paged import repack_paged_kv
from cacovid_kernels.ops.policy_loss import CombinationSums, combination_policy_loss, combination_sums, pack_masks
from cacovid_kernels.ops.repack import repack_kv
from cacovid_kernels.ops.sample import GumbelSample, gumbel_topk, pl_log_prob
from cacovid_kernels.ops.score import PolicyHead, score_tokens
from cacovid_kernels.ops.select import allocate_budget, segmented_topk, select_tokens, topk_tokens
from cacovid_kernels.policy import CompressionPolicy, PolicyConfig
from cacovid_kernels.selection import Selection, Status

__version__ = "0.1.0"

__all__ = [
    "CombinationSums",
    "Combinations",
    "CompressionPolicy",
    "GumbelSample",
    "PackedKV",
    "PagedKV",
    "PolicyConfig",
    "PolicyHead",
    "RaggedKeep",
    "Rope",
    "Selection",
    "Status",
    "allocate_budget",
    "attention_scores",
    "backends",
    "combination_policy_loss",
    "combination_sums",
    "gather_tokens",
    "gumbel_topk",
    "pack_masks",
    "pl_log_prob",
    "repack_kv",
    "repack_paged_kv",
    "sample_combinations",
    "score_tokens",
    "segmented_topk",
    "select_tokens",
    "topk_tokens",
    "use_backend",
]
